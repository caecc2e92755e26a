"""The norm behind the blocks runs by tiles where its state is long, and at other lengths where nothing fits without."""

import re
from dataclasses import replace
from fractions import Fraction

import pytest

from memo_runtime.config import make_settings
from memo_runtime.errors import PlanInfeasibleError
from memo_runtime.persist import load_plan, save
from memo_runtime.planning.planner import make_plan
from memo_runtime.planning.sheet import Sheet, lengths_of
from memo_runtime.planning.suggest import is_feasible
from memo_runtime.profiling.measured import _long_end_at
from memo_runtime.records import Growth, LongEnd
from memo_runtime.units import GiB
from tests.planning.builders import llama_profile

HIDDEN = 2 * 4096
WHOLE = {"outside_peak": Growth(linear=60 * HIDDEN), "loss_peak": Growth(linear=5 * HIDDEN)}
END = LongEnd(
    tokens=131072, outside_peak=Growth(linear=4 * HIDDEN, constant=GiB / 4), loss_peak=Growth(linear=3 * HIDDEN)
)
#: Below 131,072 tokens its end takes more than its blocks.
PROFILE = llama_profile(8, **WHOLE, long_end=END, device_bytes=300 * GiB)
SWAP = {"policy": "swap", "host_budget": "2TiB"}


def peak(tokens, **settings):
    return make_plan(PROFILE, make_settings(**SWAP, **settings), tokens={0: tokens}).forecast.peak_bytes


def test_what_head_and_loss_take_is_that_of_the_length():
    assert PROFILE.end(131071) == (131071 * 60 * HIDDEN, 131071 * 5 * HIDDEN)
    assert PROFILE.end(131072) == (4 * GiB + GiB // 4, 3 * GiB)
    assert peak(131071) > 60 * GiB > peak(131072)


def test_where_nothing_fits_the_norm_goes_by_tiles_and_the_plan_says_so(tmp_path):
    tokens = 100_000
    as_it_is = make_plan(PROFILE, make_settings(**SWAP), tokens={0: tokens})
    assert not as_it_is.norm_by_tiles
    assert not any("norm behind" in note for note in as_it_is.notes)
    less = make_plan(PROFILE, make_settings(**SWAP, budget=as_it_is.forecast.peak_bytes - GiB), tokens={0: tokens})
    assert (less.norm_by_tiles, less.profile) == (True, PROFILE)
    assert any("the norm behind the blocks runs by tiles" in note for note in less.notes)
    assert less.forecast.peak_bytes <= as_it_is.forecast.peak_bytes - GiB
    save(less, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == less


def test_no_shorter_length_is_refused_where_a_longer_one_fits():
    """Below the length from which it is long, the norm as it is would need more than at that length."""
    budget = peak(131072) + GiB // 8
    settings = make_settings(**SWAP, budget=budget)
    lengths = [lengths_of(PROFILE, {0: tokens}) for tokens in range(8192, 160_000, 4096)]
    fits = [is_feasible(Sheet(PROFILE, one), settings) for one in lengths]
    assert fits == sorted(fits, reverse=True)
    assert {True, False} == set(fits)
    assert peak(131072 - 4096, budget=budget) <= budget


def test_a_refusal_counts_the_norm_by_tiles():
    with pytest.raises(PlanInfeasibleError, match=r"would fit") as refused:
        peak(100_000, budget=6 * GiB)
    bare = replace(PROFILE, long_end=None)
    with pytest.raises(PlanInfeasibleError) as before:
        make_plan(bare, make_settings(**SWAP, budget=6 * GiB), tokens={0: 100_000})
    needs = [float(str(one.value).partition("it needs ")[2].split()[0]) for one in (refused, before)]
    assert needs[0] < needs[1]


def test_more_sequences_reach_it_at_fewer_tokens():
    assert _long_end_at(None, Fraction(2)) is None
    found = _long_end_at(END, Fraction(2))
    assert (found.tokens, found.outside_peak.linear) == (65536, 8 * HIDDEN)
    assert (found.outside_peak.constant, found.loss_peak.linear) == (GiB / 2, 6 * HIDDEN)


@pytest.mark.parametrize("policy", ["swap", "recompute", "memo", "replay", "none", "auto"])
@pytest.mark.parametrize("budget", [8 * GiB, 12 * GiB, 20 * GiB])
def test_lengths_that_would_fit_do(policy, budget):
    """Each suggested length is planned with the norm as a plan of that length has it."""
    settings = {"policy": policy, "host_budget": "2TiB", "budget": budget}
    with pytest.raises(PlanInfeasibleError) as refused:
        make_plan(PROFILE, make_settings(**settings), tokens={0: 120_000})
    found = re.search(r"([\d,]+) tokens instead of 120,000 \(device ([\d.]+) GiB", str(refused.value))
    if found is None:
        assert "no length" in str(refused.value)
        assert budget == 8 * GiB
        return
    tokens = int(found[1].replace(",", ""))
    peak_bytes = make_plan(PROFILE, make_settings(**settings), tokens={0: tokens}).forecast.peak_bytes
    assert peak_bytes <= budget
    assert peak_bytes / GiB == pytest.approx(float(found[2]), abs=0.01)


def test_it_goes_by_tiles_where_only_the_loss_takes_less():
    end = LongEnd(tokens=131072, outside_peak=PROFILE.outside_peak, loss_peak=Growth(linear=HIDDEN))
    sheet = Sheet(replace(PROFILE, long_end=end), lengths_of(PROFILE, {0: 4096}))
    assert sheet.with_norm_by_tiles().norm_by_tiles
    assert sheet.with_norm_by_tiles().with_norm_by_tiles() is None
    assert not sheet.with_norm_by_tiles().at((2048,) * 8).norm_by_tiles


def test_policy_none_runs_nothing_by_tiles():
    as_it_is = make_plan(PROFILE, make_settings(policy="none"), tokens={0: 100_000}).forecast.peak_bytes
    with pytest.raises(PlanInfeasibleError):
        make_plan(PROFILE, make_settings(policy="none", budget=as_it_is - GiB), tokens={0: 100_000})
