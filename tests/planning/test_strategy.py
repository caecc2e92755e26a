"""What counts as feasible: whatever a strategy decides, also where neither end of the range fits."""

from dataclasses import replace

import pytest

from memo_runtime.config import make_settings
from memo_runtime.errors import HostLimitError, PlanInfeasibleError
from memo_runtime.planning.limits import Budgets
from memo_runtime.planning.planner import make_plan
from memo_runtime.planning.policies import strategy_for
from memo_runtime.planning.sheet import Sheet, lengths_of
from memo_runtime.planning.suggest import is_feasible
from memo_runtime.records import Growth, ModelStates, Role
from tests.planning.builders import group, llama_block, profile_of

TOKENS = 1024
ROW = 600


def profile_with(count, **changes):
    """Blocks whose rerun takes more room than their forward and backward, and less the fewer rows it makes."""
    block = replace(
        llama_block(tokens=TOKENS, groups=(group(Role.TOKEN, ROW),)),
        forward_seconds=Growth(linear=1e-3),
        backward_seconds=Growth(linear=1e-3),
        rerun_seconds=Growth(linear=1e-6),
        forward_peak=Growth(linear=2600),
        backward_peak=Growth(linear=100),
        rerun_peak=Growth(linear=4000),
        output=Growth(linear=1500),
        gradients=1_000_000,
    )
    return profile_of(
        [replace(block, name=f"layers.{number}", **changes) for number in range(count)],
        states=ModelStates(parameters=10**5, buffers=0, gradients=1_000_000 * count, optimizer=0),
        allocated_bytes=10**5,
        shared=Growth(),
        outside_forward=Growth(),
        outside_peak=Growth(linear=4000),
    )


def between_the_ends(profile, *, accumulating):
    """Budgets that three quarters of a prefix keep; not an empty one (its rerun), nor a whole one (its copies)."""

    def at(alpha):
        settings = make_settings(policy="memo", alpha=alpha, keep_last=0)
        return make_plan(profile, settings, accumulating=accumulating).forecast

    less, more = at(0.625), at(0.875)
    return {"budget": less.peak_bytes + 100, "host_budget": more.host_bytes}


def no_stand_by_fits(profile, settings, *, accumulating=False):
    sheet = Sheet(profile, lengths_of(profile, None), accumulating=accumulating)
    budgets = Budgets.of(sheet, settings)
    return strategy_for(settings, budgets)[0].first_fitting(sheet, budgets) is None


@pytest.mark.parametrize(
    "asked", [{"policy": "memo", "keep_last": 0}, {"policy": "replay", "keep_last": 0}, {"policy": "auto"}]
)
def test_what_fits_between_the_ends_alone_is_feasible_and_planned(asked):
    profile = profile_with(6)
    settings = make_settings(**asked, **between_the_ends(profile, accumulating=True))
    assert no_stand_by_fits(profile, settings, accumulating=True)
    sheet = Sheet(profile, lengths_of(profile, None), accumulating=True)
    assert is_feasible(sheet, settings)
    plan = make_plan(profile, settings, accumulating=True)
    assert plan.forecast.peak_bytes <= settings.budget
    assert plan.forecast.host_bytes <= settings.host_budget


def test_a_plan_does_not_warn_of_accumulation_that_fits_between_the_ends():
    profile = profile_with(6)
    budgets = between_the_ends(profile, accumulating=True)
    plan = make_plan(profile, make_settings(policy="replay", keep_last=0, **budgets))
    assert not any("steps that start with gradients" in note for note in plan.notes)


def test_a_refused_accumulation_says_that_a_fresh_step_fits_between_the_ends():
    profile = profile_with(6)
    settings = make_settings(policy="replay", keep_last=0, **between_the_ends(profile, accumulating=False))
    assert no_stand_by_fits(profile, settings)
    with pytest.raises(PlanInfeasibleError) as caught:
        make_plan(profile, settings, accumulating=True)
    assert "zero_grad(set_to_none=True) before each forward" in str(caught.value)
    make_plan(profile, settings)


def test_the_last_block_may_fit_only_with_its_input_on_the_device():
    groups = (group(Role.INPUT, ROW), group(Role.TOKEN, ROW))
    profile = profile_with(1, groups=groups)
    budget = make_plan(profile, make_settings(policy="recompute", keep_last=0)).forecast.peak_bytes
    settings = make_settings(policy="replay", keep_last=0, budget=budget, host_budget="10B")
    with pytest.raises(HostLimitError):
        make_plan(profile, make_settings(policy="recompute", keep_last=0, budget=budget, host_budget="10B"))
    plan = make_plan(profile, settings)
    assert [block.resident for block in plan.blocks] == [True]
    assert plan.forecast.host_bytes == 0
    assert is_feasible(Sheet(profile, lengths_of(profile, None)), settings)
    exact = make_settings(policy="replay", keep_last=0, budget=plan.forecast.peak_bytes + 10**6, host_budget="10B")
    assert not any("steps that start with gradients" in note for note in make_plan(profile, exact).notes)
