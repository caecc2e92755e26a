"""Steps that start with gradients: micro-batches, zero_grad(set_to_none=False). Planned for, exact, within the budget.

On CPU gradients are reserved at every point of either kind of step; ``walking`` reckons as on a device with an
allocator, so that the two kinds have different plans here too.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.errors import PlanInfeasibleError
from memo_runtime.planning.forecast import Surroundings
from memo_runtime.records import Plan, Profile
from tests.api.subjects import Gradients, assert_close, assert_nothing_held, loss_of
from tests.api.towers import BOUND, POLICIES, signal, tower


@pytest.fixture
def walking(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Surroundings.of.__func__  # type: ignore[attr-defined]

    def of(
        cls: type[Surroundings], profile: Profile, tokens: int, *, accumulating: bool = False, **more: bool
    ) -> Surroundings:
        around: Surroundings = original(cls, profile, tokens, accumulating=accumulating, **more)
        if accumulating:
            return around
        outside = profile.states.gradients - sum(block.gradients for block in profile.blocks)
        base = around.base_bytes - profile.states.gradients
        return replace(around, gradual=True, base_bytes=base, outside_gradients=outside)

    monkeypatch.setattr(Surroundings, "of", classmethod(of))


def plan_of(model: Any) -> Plan:
    plan: Plan = model._memo.session.plan
    return plan


def gradients(model: nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def accumulate(model: nn.Module, steps: int = 3) -> Gradients:
    """Gradients of some micro-batches, added up."""
    model.zero_grad(set_to_none=True)
    for seed in range(steps):
        loss_of(model, signal(seed=seed)).backward()
    return gradients(model)


@pytest.mark.parametrize("policy", POLICIES)
def test_accumulated_gradients_are_exact_and_planned_for(policy: str) -> None:
    model, plain = memo.wrap(tower(), **POLICIES[policy]), tower()
    for _ in range(2):
        assert_close(accumulate(model), accumulate(plain))
    assert plan_of(model).accumulating
    assert_nothing_held(model)


def test_a_step_that_starts_without_gradients_has_the_plan_of_one() -> None:
    model = memo.wrap(tower(), **POLICIES["memo"])
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        loss_of(model, signal()).backward()
        assert not plan_of(model).accumulating
    model.zero_grad(set_to_none=False)
    loss_of(model, signal()).backward()
    assert plan_of(model).accumulating


def test_gradients_of_frozen_and_outer_parameters() -> None:
    model = memo.wrap(tower(), **POLICIES["memo"])
    model.layers[0].requires_grad_(False)
    model.layers[0].norm.weight.grad = torch.zeros_like(model.layers[0].norm.weight)
    loss_of(model, signal()).backward()
    assert not plan_of(model).accumulating
    model.zero_grad(set_to_none=True)
    model.last.weight.grad = torch.zeros_like(model.last.weight)
    loss_of(model, signal()).backward()
    assert plan_of(model).accumulating


def test_the_plan_changes_once_and_keeps_its_host_memory(caplog: pytest.LogCaptureFixture) -> None:
    model = memo.wrap(tower(), **POLICIES["swap"])
    with caplog.at_level(logging.INFO, logger="memo_runtime"):
        plans = []
        for _ in range(3):
            accumulate(model)
            plans.append(plan_of(model))
    assert plans[0] is plans[1] is plans[2]
    assert sum("x replay" in record.getMessage() for record in caplog.records) == 2


def needs(profile: Profile, *, accumulating: bool) -> tuple[int, int]:
    """(least, most) device bytes that a plan may take."""
    from memo_runtime.config import make_settings
    from memo_runtime.planning.planner import make_plan

    plan = make_plan(profile, make_settings(policy="none"), accumulating=accumulating)
    return plan.floor_bytes, plan.forecast.peak_bytes


@pytest.mark.usefixtures("walking")
def test_the_budget_holds_in_both_kinds_of_step_by_different_plans() -> None:
    profile = memo.profile(tower(6), signal(tokens=40))
    _, most = needs(profile, accumulating=False)
    least, _ = needs(profile, accumulating=True)
    assert least < most
    budget = (least + most) // 2
    model, plain = memo.wrap(tower(6), policy="auto", budget=f"{budget}B"), tower(6)
    plans = []
    for seed in range(3):
        loss_of(model, signal(tokens=40, seed=seed)).backward()
        loss_of(plain, signal(tokens=40, seed=seed)).backward()
        assert_close(gradients(model), gradients(plain), BOUND)
        plans.append(plan_of(model))
        assert plans[-1].forecast.peak_bytes <= budget
    assert [plan.accumulating for plan in plans] == [False, True, True]
    kept = [sum(block.bytes_kept for block in plan.blocks) for plan in plans]
    assert kept[0] > kept[1]
    assert not any("steps that start with gradients do not fit" in note for note in plans[0].notes)


@pytest.mark.usefixtures("walking")
@pytest.mark.parametrize("given", [False, True])
def test_what_does_not_fit_is_said_in_the_first_plan_and_refused_with_the_cure(given: bool) -> None:
    profile = memo.profile(tower(), signal(tokens=40))
    fresh, _ = needs(profile, accumulating=False)
    least, _ = needs(profile, accumulating=True)
    assert fresh < least
    budget = f"{(fresh + least) // 2}B"
    replay = {"policy": "replay", "keep_last": 0, "budget": budget}  # auto would try tiles, and these fit
    settings = {"plan": memo.plan(profile, budget=budget)} if given else replay
    model, plain = memo.wrap(tower(), **settings), tower()
    for _ in range(2):
        for one in (model, plain):
            one.zero_grad(set_to_none=True)
            loss_of(one, signal(tokens=40)).backward()
        assert_close(gradients(model), gradients(plain))
        assert any("steps that start with gradients do not fit" in note for note in memo.report(model).notes)
        before = gradients(model)
        with pytest.raises(PlanInfeasibleError, match=r"zero_grad\(set_to_none=True\) before each forward"):
            loss_of(model, signal(tokens=40))
        assert_close(gradients(model), before, 0)
    assert_nothing_held(model)
