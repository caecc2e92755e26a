"""The system gives less host memory than ``host_budget`` allows: a run stops before the step, or goes on within it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.errors import AlreadyWrappedError, ArgumentError, HostLimitError, PinningError
from memo_runtime.native.backend import CompiledBackend, TorchBackend
from memo_runtime.native.slab import Slab
from memo_runtime.profiling.link import measure_link
from tests.api.subjects import acted, assert_nothing_held, assert_trains_as, refused, step, totals
from tests.api.towers import POLICIES, signal, tower


@pytest.fixture
def system_gives(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes of host memory there are; the link is measured before, with memory of its own."""
    measure_link(torch.device("cpu"))
    made: dict[int, int] = {}
    originals = [(backend, backend.slab) for backend in (CompiledBackend, TorchBackend)]

    def limit(most: int) -> None:
        for backend, original in originals:

            def scarce(self: Any, size: int, *, allow_partial: bool = False, make: Any = original) -> Slab:
                left = most - sum(made.values())
                if size > left and (left <= 0 or not allow_partial):
                    raise PinningError(f"the driver pins no more (refused after {max(0, left)} bytes)")
                slab: Slab = make(self, min(size, left), allow_partial=allow_partial)
                slab.refusal = f"the driver pins no more than {left} bytes" if size > left else ""
                made[id(slab)] = slab.size
                closing = slab.close
                slab.close = lambda: (made.pop(id(slab), None), closing())[1]  # type: ignore[method-assign]
                return slab

            monkeypatch.setattr(backend, "slab", scarce)

    return limit


def needed_by(policy: str, tokens: int = 24) -> int:
    """Host bytes of a step."""
    return memo.plan(memo.profile(tower(), signal(tokens=tokens)), policy=policy).forecast.host_bytes


def refusals(model: nn.Module) -> list[str]:
    """Notes of the report on memory that was refused."""
    return [note for note in memo.report(model).notes if "the system gives" in note]


@pytest.mark.parametrize("policy", ["auto", "replay", "memo"])
def test_the_run_goes_on_within_what_there_is(policy: str, system_gives: Callable[[int], None]) -> None:
    needed = needed_by(policy)
    there = needed // 2 + 7
    system_gives(there)
    model, plain = memo.wrap(tower(), policy=policy, on_refusal="go_on"), tower()
    for tokens in (24, 24, 40, 24):
        assert_trains_as(model, plain, signal(tokens=tokens))
        report = acted(model)
        assert 0 < report.totals.host_bytes <= there
        assert report.totals.forecast.host_bytes <= there
    (note,) = refusals(model)
    assert "of host memory were asked for within host_budget" in note
    assert f"the driver pins no more than {there} bytes: planned anew within that" in note
    assert_nothing_held(model)
    memo.unwrap(model)
    assert_trains_as(model, plain, signal())


def test_a_length_that_comes_later_may_be_the_one_that_is_refused(system_gives: Callable[[int], None]) -> None:
    there = needed_by("auto")
    system_gives(there)
    model, plain = memo.wrap(tower(), on_refusal="go_on"), tower()
    assert_trains_as(model, plain, signal())
    assert not refusals(model)
    for tokens in (200, 24):
        assert_trains_as(model, plain, signal(tokens=tokens))
        assert totals(model).host_bytes <= there
    assert len(refusals(model)) == 1
    assert_nothing_held(model)


def test_memory_that_there_was_nothing_of(system_gives: Callable[[int], None]) -> None:
    system_gives(0)
    model, plain = memo.wrap(tower(), on_refusal="go_on"), tower()
    for _ in range(2):
        assert_trains_as(model, plain, signal())
        assert totals(model).host_bytes == totals(model).bytes_to_host == 0
    assert "the system gives 0 B" in refusals(model)[0]


def test_what_does_not_fit_at_all_stops_before_the_step(system_gives: Callable[[int], None]) -> None:
    system_gives(4096)
    model, plain = memo.wrap(tower(), on_refusal="go_on", **POLICIES["swap"]), tower()
    for attempt in range(2):
        message = refused(HostLimitError, step, model, signal())
        assert "what the system gave of more" in message
        assert ("since      " in message and "the driver pins no more" in message) == (attempt == 0)
        assert all(parameter.grad is None for parameter in model.parameters())
    memo.wrap(memo.unwrap(model), **POLICIES["recompute"] | {"keep_last": 3})
    assert_trains_as(model, plain, signal())


def test_by_default_it_stops_before_the_step_and_names_the_knobs(system_gives: Callable[[int], None]) -> None:
    system_gives(4096)
    model, plain = memo.wrap(tower(), host_budget="1GiB", **POLICIES["memo"]), tower()
    message = refused(PinningError, step, model, signal())
    assert "the driver pins no more (refused after 4096 bytes)" in message
    assert "host_budget, 1.00 GiB" in message
    assert "on_refusal='go_on'" in message
    assert all(parameter.grad is None for parameter in model.parameters())
    assert totals(model).host_bytes == 0
    system_gives(1 << 30)
    assert_trains_as(model, plain, signal())
    acted(model)


def test_it_is_a_setting_like_others() -> None:
    model = memo.wrap(tower(), on_refusal="go_on")
    assert memo.wrap(model, on_refusal="go_on") is model
    with pytest.raises(AlreadyWrappedError, match="on_refusal='go_on'"):
        memo.wrap(model)
    with pytest.raises(ArgumentError, match="on_refusal='ask' is unknown; there are: stop, go_on"):
        memo.wrap(tower(), on_refusal="ask")
    plan = memo.plan(memo.profile(tower(), signal()))
    with pytest.raises(ArgumentError, match="a plan is carried out as it is"):
        memo.wrap(tower(), plan=plan, on_refusal="go_on")
