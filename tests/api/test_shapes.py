"""Shapes that change from step to step: one profile, exact gradients, exact forecasts, and nothing that piles up."""

from __future__ import annotations

import os
import random
import statistics
from typing import Any

import pytest
from torch import nn

import memo_runtime as memo
from memo_runtime.config import make_settings
from memo_runtime.lookup import find_wrapped
from memo_runtime.planning.planner import make_plan
from memo_runtime.recent import Recent
from memo_runtime.wrapping import Wrapped
from tests.api.subjects import acted, assert_nothing_held, assert_trains_as, llama, totals
from tests.api.towers import POLICIES, signal, tower
from tests.integrations.models import batch
from tests.planning.builders import llama_profile


def wrapped_in(model: nn.Module) -> Wrapped:
    found = find_wrapped(model)
    assert found is not None
    return found


def forecast_is_exact(model: nn.Module) -> None:
    found = acted(model).totals
    assert found.bytes_kept == found.forecast.bytes_kept
    assert found.stash_peak_bytes == found.forecast.stash_peak_bytes
    assert found.peak_bytes == found.forecast.peak_bytes


@pytest.mark.parametrize("policy", POLICIES)
def test_a_new_shape_at_every_step(policy: str) -> None:
    model, plain = memo.wrap(tower(), **POLICIES[policy]), tower()
    draw = random.Random(5)
    shapes = [(2, 24), *((draw.randint(1, 6), draw.randint(9, 80)) for _ in range(20))]
    for rows, tokens in shapes:
        assert_trains_as(model, plain, signal(rows=rows, tokens=tokens, seed=tokens))
        forecast_is_exact(model)
    assert wrapped_in(model).profiled == 1
    assert_nothing_held(model)


def test_a_llama_with_padding_and_a_new_shape_at_every_step() -> None:
    model, plain = memo.wrap(llama(), **POLICIES["memo"], loss="native"), llama()
    for seed, (rows, tokens) in enumerate([(3, 24), (1, 37), (5, 12), (2, 61), (4, 37)]):
        inputs: dict[str, Any] = batch(rows=rows, tokens=tokens, seed=seed)
        inputs["attention_mask"] = (inputs["input_ids"] >= 0).long()
        inputs["attention_mask"][0, -3:] = 0
        assert_trains_as(model, plain, inputs)
        forecast_is_exact(model)
    assert wrapped_in(model).profiled == 1
    assert_nothing_held(model)


def test_plans_and_host_memory_do_not_pile_up() -> None:
    model = memo.wrap(tower(2), **POLICIES["swap"])
    inside = wrapped_in(model)
    most = 0
    for tokens in [*range(8, 90), *range(90, 8, -3)]:
        model(signal(rows=1, tokens=tokens)).sum().backward()
        most = max(most, totals(model).forecast.host_bytes)
        assert totals(model).host_bytes <= most
    assert len(inside._plans) == inside._plans.limit < 82
    assert inside.profiled == 1
    kept = totals(model).host_bytes
    for tokens in (8, 40, 8, 61):
        model(signal(rows=1, tokens=tokens)).sum().backward()
        assert totals(model).host_bytes == kept, "what is reserved and enough is not reserved anew"
    assert_nothing_held(model)


def test_a_plan_that_was_dropped_is_made_again() -> None:
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    inside = wrapped_in(model)
    inside._plans = Recent(1)
    for tokens in (24, 31, 24, 31):
        assert_trains_as(model, plain, signal(tokens=tokens))
        forecast_is_exact(model)
    assert inside.profiled == 1


def test_the_least_recently_used_goes_first() -> None:
    some: Recent[int] = Recent(2)
    some.put("a", 1)
    some.put("b", 2)
    assert some.get("a") == 1
    some.put("c", 3)
    assert (some.get("b"), some.get("a"), some.get("c"), len(some)) == (None, 1, 3, 2)
    assert some.latest() == 3
    assert Recent[int](1).latest() is None


@pytest.mark.parametrize("policy", ["auto", "replay"])
def test_a_plan_for_another_length_takes_a_fraction_of_a_second(policy: str) -> None:
    """With 32 blocks and a budget, so that the linear program runs. Of the processor's time, the solver's included."""
    profile = llama_profile(32)
    settings = make_settings(policy=policy, budget="60GiB")
    taken = []
    for tokens in (65536, 80001, 100003, 110211, 131072):
        start = sum(os.times()[:4])
        make_plan(profile, settings, tokens={0: tokens})
        taken.append(sum(os.times()[:4]) - start)
    assert statistics.median(taken) < 0.5
