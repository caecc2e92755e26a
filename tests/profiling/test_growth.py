"""Fits of counts and seconds by length."""

from __future__ import annotations

import pytest

from memo_runtime.profiling.growth import fit_counts, fit_peak, fit_seconds


def test_counts_are_exact_polynomials():
    def flops(t: int) -> int:
        return 7 + 43008 * t + 384 * t * t

    grown = fit_counts([(t, flops(t)) for t in (151, 188, 251)])
    assert grown.at(1 << 20) == flops(1 << 20)


def test_seconds_of_launches_products_and_attention_are_told_apart():
    def seconds(t: int) -> float:
        return 2e-3 + 4e-7 * t + 3e-11 * t * t

    grown = fit_seconds([(t, seconds(t)) for t in (4096, 8192, 16384)], curved=True)
    assert grown.exact(65536) == pytest.approx(seconds(65536), rel=1e-6)


def test_a_noisy_fit_has_no_negative_part():
    grown = fit_seconds([(128, 1.3e-3), (256, 1.0e-3), (512, 2.4e-3)], curved=True)
    assert min(grown.constant, grown.linear, grown.quadratic) >= 0
    assert grown.exact(512) == pytest.approx(2.4e-3)


LENGTHS = (2048, 4096, 8192)


def test_what_does_not_grow_in_a_peak_is_told_from_what_does():
    grown = fit_peak([(t, 112_000_000 + 84_000 * t) for t in LENGTHS], curved=False)
    assert grown.at(65536) == 112_000_000 + 84_000 * 65536
    # What allocators round is no bend, and the steeper slope counts.
    extra = {2048: 2_000_000}
    rounded = fit_peak([(t, 112_000_000 + 84_000 * t + extra.get(t, 0)) for t in LENGTHS], curved=False)
    assert grown.at(65536) <= rounded.at(65536) <= 1.01 * grown.at(65536)


@pytest.mark.parametrize("longer", [8192, 16384, 131072])
def test_a_peak_in_which_another_moment_takes_over_is_an_upper_bound(longer: int):
    def peak(t: int) -> int:
        return max(400_000_000 + 10_000 * t, 100_000_000 + 100_000 * t)

    assert fit_peak([(t, peak(t)) for t in LENGTHS], curved=False).at(longer) >= peak(longer)


def test_peaks_of_attention_weights_grow_with_the_square():
    grown = fit_peak([(t, 1000 + 50 * t + 3 * t * t) for t in LENGTHS], curved=True)
    assert grown.at(65536) == 1000 + 50 * 65536 + 3 * 65536**2
    assert fit_peak([(512, 3 * 512**2)], curved=True).at(1024) == 3 * 1024**2


def test_peaks_of_one_length_and_none_at_all():
    assert fit_peak([(512, 1024)], curved=False).at(1024) == 2048
    assert fit_peak([(512, -7)], curved=False).at(1024) == 0
    assert fit_peak([(t, 0) for t in LENGTHS], curved=False).at(1 << 20) == 0
    assert fit_peak([], curved=False).at(512) == 0
