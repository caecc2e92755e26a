"""Fits of counts and seconds by length."""

from __future__ import annotations

import pytest

from memo_runtime.profiling.growth import fit_counts, fit_seconds


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
