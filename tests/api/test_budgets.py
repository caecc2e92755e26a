"""Budgets that cannot be kept are refused before anything is allocated, with what would fit; then training goes on."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.errors import ArgumentError, BlockFallbackError, HostLimitError, PlanInfeasibleError
from memo_runtime.native.backend import CompiledBackend, TorchBackend
from memo_runtime.planning.sheet import PlanRequestError
from memo_runtime.profiling.link import measure_link
from memo_runtime.units import parse_bytes
from tests.api.subjects import acted, assert_nothing_held, assert_trains_as, refused, step, totals
from tests.api.towers import HIDDEN, POLICIES, Tower, signal, tower


@pytest.fixture
def slabs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of host memory as it is allocated for steps; the link is measured before, once a process."""
    measure_link(torch.device("cpu"))
    made: list[int] = []
    for backend in (CompiledBackend, TorchBackend):
        original = backend.slab

        def counting(self: Any, size_bytes: int, *, allow_partial: bool = False, make: Any = original) -> Any:
            made.append(size_bytes)
            return make(self, size_bytes, allow_partial=allow_partial)

        monkeypatch.setattr(backend, "slab", counting)
    return made


def longest_in(message: str) -> int:
    found = re.search(r"([\d,]+) tokens instead of ([\d,]+)", message)
    assert found, message
    assert found[2] == "40"
    return int(found[1].replace(",", ""))


def budget_between(policy: dict[str, Any], field: str) -> int:
    """A budget that 40 tokens exceed and 24 keep."""
    profile = memo.profile(tower(), signal(tokens=40))
    sizes = [getattr(memo.plan(profile, seq_len=n, **policy).forecast, field) for n in (24, 40)]
    assert sizes[0] < sizes[1]
    return (sizes[0] + sizes[1]) // 2


@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_below_the_floor_names_the_longest_length_and_that_fits(policy: str, slabs: list[int]) -> None:
    """For ``auto`` see ``tests/exactness/test_tiled_auto.py``."""
    settings = POLICIES[policy]
    budget = budget_between(settings, "peak_bytes")
    model, plain = memo.wrap(tower(), budget=budget, **settings), tower()
    message = refused(PlanInfeasibleError, step, model, signal(tokens=40))
    assert message.startswith("this step does not fit in ")
    assert "(budget)" in message
    assert "short by" in message
    assert "layers." in message
    longest = longest_in(message)
    assert 24 <= longest < 40
    assert slabs == []
    assert_trains_as(model, plain, signal(tokens=longest))
    assert acted(model).totals.peak_bytes <= budget
    refused(PlanInfeasibleError, step, model, signal(tokens=40))
    assert_trains_as(model, plain, signal(tokens=longest))
    assert_nothing_held(model)
    assert_trains_as(memo.unwrap(model), plain, signal(tokens=40), bound=0)


def test_a_budget_below_the_model_itself_has_no_length_and_says_what_there_is() -> None:
    model, plain = memo.wrap(tower(), budget="1KiB"), tower()
    message = refused(PlanInfeasibleError, step, model, signal())
    assert "tokens instead" not in message
    assert "optimizer (AdamW, assumed) " in message
    assert "parameters " in message
    suggested = re.search(r"budget='([^']+)'", message)
    assert suggested
    assert_trains_as(memo.wrap(memo.unwrap(model), budget=suggested[1]), plain, signal())
    acted(model)


def test_the_budget_that_a_refusal_suggests_is_enough() -> None:
    budget = budget_between(POLICIES["swap"], "peak_bytes")
    message = refused(
        PlanInfeasibleError, step, memo.wrap(tower(), budget=budget, **POLICIES["swap"]), signal(tokens=40)
    )
    suggested = re.search(r"budget='([^']+)'", message)
    assert suggested
    model = memo.wrap(tower(), budget=suggested[1], **POLICIES["swap"])
    assert_trains_as(model, tower(), signal(tokens=40))
    assert acted(model).totals.peak_bytes <= parse_bytes(suggested[1])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_host_budget_is_refused_before_anything_is_allocated(policy: str, slabs: list[int]) -> None:
    budget = budget_between(POLICIES[policy], "host_bytes")
    model, plain = memo.wrap(tower(), host_budget=budget, **POLICIES[policy]), tower()
    message = refused(HostLimitError, step, model, signal(tokens=40))
    assert slabs == []
    assert "of host memory" in message
    assert "(host_budget)" in message
    longest = longest_in(message)
    assert_trains_as(model, plain, signal(tokens=longest))
    assert slabs == [totals(model).forecast.host_bytes]
    assert totals(model).host_bytes <= budget
    refused(HostLimitError, step, model, signal(tokens=40))
    assert len(slabs) == 1
    assert_trains_as(model, plain, signal(tokens=longest))
    assert_nothing_held(model)
    assert_trains_as(memo.unwrap(model), plain, signal(tokens=40), bound=0)


def test_a_host_budget_of_nothing() -> None:
    model, plain = memo.wrap(tower(), host_budget=0, **POLICIES["swap"]), tower()
    assert "host_budget='" in refused(HostLimitError, step, model, signal())
    assert_trains_as(memo.unwrap(model), plain, signal())


def test_a_length_at_which_the_host_is_exactly_full() -> None:
    needed = memo.plan(memo.profile(tower(), signal()), **POLICIES["memo"]).forecast.host_bytes
    model, plain = memo.wrap(tower(), host_budget=needed, **POLICIES["memo"]), tower()
    for _ in range(3):
        assert_trains_as(model, plain, signal())
        assert totals(model).host_bytes == needed
    refused(HostLimitError, step, memo.wrap(tower(), host_budget=needed - 1, **POLICIES["memo"]), signal())


def test_auto_lowers_its_fraction_rather_than_exceed_the_host() -> None:
    profile = memo.profile(tower(), signal())
    low, high = (memo.plan(profile, **POLICIES[p]).forecast.host_bytes for p in ("recompute", "swap"))
    model, plain = memo.wrap(tower(), policy="memo", keep_last=0, host_budget=(low + high) // 2), tower()
    assert_trains_as(model, plain, signal())
    assert totals(model).host_bytes <= (low + high) // 2
    acted(model)


def test_a_step_that_does_not_fit_beside_another_is_refused_and_the_next_one_is_right() -> None:
    """Two forwards before a backward, where the host holds one: the plan counted one."""
    needed = memo.plan(memo.profile(tower(), signal()), **POLICIES["memo"]).forecast.host_bytes
    model, plain = memo.wrap(tower(), host_budget=needed * 3 // 2, **POLICIES["memo"]), tower()
    step(model, signal())
    first = model(signal()).square().mean()
    message = refused(HostLimitError, step, model, signal(seed=2))
    assert "host_budget" in message
    assert totals(model).host_bytes <= needed * 3 // 2
    first.backward()  # the one that was there is whole
    want = plain(signal()).square().mean()
    want.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-14)
    del first
    for seed in (2, 3):
        assert_trains_as(model, plain, signal(seed=seed))
        acted(model)
    assert_nothing_held(model)


# Settings that do not go with the model.


class OverTokens(nn.Module):
    """A block with weights of the size of the sequence, as in an MLP mixer: it runs at no other length."""

    def __init__(self) -> None:
        super().__init__()
        self.along = nn.Linear(24, 24)
        self.across = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.along(x.transpose(1, 2)).tanh().transpose(1, 2)
        return x + self.across(x).tanh()


def test_strict_refuses_blocks_that_fall_back() -> None:
    def made() -> nn.Module:
        model = tower()
        torch.manual_seed(1)
        model.layers = nn.ModuleList([*model.layers[:2], OverTokens().double(), OverTokens().double()])
        return model

    model, plain = memo.wrap(made(), strict=True, **POLICIES["memo"]), made()
    message = refused(BlockFallbackError, step, model, signal())
    assert message.startswith("strict=True and 2 of 4 blocks cannot take policy 'memo'")
    assert "layers.2, layers.3" in message
    assert "strict=False" in message
    refused(BlockFallbackError, step, model, signal(rows=1))
    memo.unwrap(model)
    assert_trains_as(model, plain, signal())
    memo.wrap(model, **POLICIES["memo"])
    for _ in range(2):
        assert_trains_as(model, plain, signal())
    report = memo.report(model)
    assert [bool(block.reason) for block in report.blocks] == [False, False, True, True]
    assert any("layers.2" in note and "cannot take policy 'memo'" in note for note in report.notes)


def test_strict_lets_a_model_through_that_takes_the_policy() -> None:
    model = memo.wrap(tower(), strict=True, **POLICIES["memo"])
    assert_trains_as(model, tower(), signal())
    acted(model)


def test_keep_last_larger_than_the_stack() -> None:
    model, plain = tower(), tower()
    for call, inputs in ((memo.wrap, ()), (memo.check, (signal(),))):
        message = refused(ArgumentError, call, model, *inputs, policy="swap", keep_last=4)
        assert "keep_last=4" in message
        assert "layers.0 to layers.2" in message
        assert "give 0 to 3" in message
    assert_trains_as(model, plain, signal())
    refused(PlanRequestError, memo.plan, memo.profile(model, signal()), policy="swap", keep_last=4)
    assert_trains_as(memo.wrap(model, policy="swap", keep_last=3), plain, signal(), bound=0)


class SecondFirst(nn.Module):
    """Two towers that are called in another order than they are listed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = Tower(2), Tower(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = self.two(x[:, :17])
        return torch.cat([self.one(x), other], dim=1)


def test_blocks_are_planned_in_the_order_of_their_calls() -> None:
    """What a block keeps that is called early is there all the time."""
    model, plain = SecondFirst().double(), SecondFirst().double()
    profile = memo.profile(model, signal(tokens=40))
    assert [block.name.split(".")[0] for block in profile.blocks] == ["two", "two", "one", "one"]
    floor, most = (memo.plan(profile, policy=policy).forecast.peak_bytes for policy in ("recompute", "none"))
    for share in (0.1, 0.4, 0.7):
        budget = int(floor + share * (most - floor))
        memo.wrap(model, budget=budget)
        for _ in range(2):
            assert_trains_as(model, plain, signal(tokens=40))
        assert totals(model).peak_bytes == totals(model).forecast.peak_bytes <= budget
        memo.unwrap(model)
    plan = memo.plan(profile, policy="swap")
    memo.wrap(model, plan=plan, blocks=[model.one.layers, model.two.layers])
    assert_trains_as(model, plain, signal(tokens=40))
