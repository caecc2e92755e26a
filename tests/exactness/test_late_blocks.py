"""Blocks that the first step does not call: layer drop, branches, blocks that come alive later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.lookup import find_wrapped
from memo_runtime.records import Executor
from memo_runtime.reports import BlockReport
from memo_runtime.wrapping import Wrapped
from tests.exactness.compare import (
    MEMO,
    OTHER_WAYS,
    SWAP,
    Way,
    assert_acted,
    assert_clean,
    assert_same,
    assert_trade,
    output_loss,
    plan_of,
    run_step,
)
from tests.exactness.hand_written import Attention, Part, Stack, TwoMixers, merge_heads, sequence

three_ways = pytest.mark.parametrize("way", OTHER_WAYS, ids=str)
LATE = "not called when the model was profiled"


class Choosing(Stack):
    """Calls some of its blocks."""

    called: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        for index in self.called:
            hidden = self.blocks[index](hidden)
        return self.head(hidden)


def wrapped_in(model: nn.Module) -> Wrapped:
    found = find_wrapped(model)
    assert found is not None
    return found


class Both:
    """The same model unwrapped and wrapped."""

    def __init__(self, way: Way, *kinds: type[nn.Module], **settings: Any) -> None:
        torch.manual_seed(0)
        self.way = way
        self.plain, self.wrapped = (Choosing(*(kind() for kind in kinds)).double() for _ in range(2))
        self.wrapped.load_state_dict(self.plain.state_dict())
        way.wrap(self.wrapped, **settings)

    def step(self, *called: int, rows: int = 2, tokens: int = 21) -> dict[str, BlockReport]:
        """A step that calls these blocks, like the plain one's; the report by block."""
        steps = []
        for model in (self.plain, self.wrapped):
            model.called = called
            steps.append(run_step(model, {"x": sequence(rows=rows, tokens=tokens)}, output_loss))
        assert_same(steps[1], steps[0], self.way)
        assert_clean(self.wrapped)
        found = {block.name: block for block in memo.report(self.wrapped).blocks}
        assert list(found) == [f"blocks.{index}" for index in sorted(called)]
        return found

    @property
    def profiled(self) -> int:
        return wrapped_in(self.wrapped).profiled


def is_managed(block: BlockReport) -> bool:
    return block.executor in (Executor.REPLAY, Executor.RECOMPUTE) and block.bytes_to_host > 0 and not block.reason


@three_ways
@pytest.mark.parametrize("left_out", [0, 1, 3])
def test_layer_drop_leaves_no_block_unmanaged(way: Way, left_out: int) -> None:
    """The blocks that a first step drops are compared with those that it calls: no step is without a plan for one."""
    both = Both(way, *([Attention] * 4))
    for dropped in (left_out, 2, None, 0):
        found = both.step(*(index for index in range(4) if index != dropped))
        assert all(is_managed(block) for block in found.values())
        assert len(plan_of(both.wrapped).blocks) == 4
    both.step(0, 1, 2, 3)
    assert_acted(both.wrapped, way)
    assert_trade(both.wrapped)
    assert both.profiled == 1


@three_ways
def test_blocks_of_another_kind_are_profiled_once_they_are_called(way: Way) -> None:
    both = Both(way, Attention, Attention, TwoMixers, TwoMixers)
    both.step(0, 1)
    found = both.step(0, 1, 2, 3)
    assert is_managed(found["blocks.0"])
    assert found["blocks.2"].executor == Executor.NATIVE
    assert LATE in found["blocks.2"].reason
    for called in [(0, 1, 2, 3), (0, 1), (2, 3), (0, 1, 2, 3)]:
        assert all(is_managed(block) for block in both.step(*called).values())
    assert_acted(both.wrapped, way)
    assert_trade(both.wrapped)
    assert both.profiled == 2


@three_ways
def test_branches_that_take_turns(way: Way) -> None:
    """What an earlier batch called is carried over where this one does not."""
    both = Both(way, Attention, Attention, Twin, Twin, TwoMixers, TwoMixers)
    branches = [(0, 1), (2, 3), (2, 3), (4, 5), (4, 5), (0, 1, 2, 3, 4, 5)]
    for called in branches:
        found = both.step(*called)
    assert all(is_managed(block) for block in found.values())
    assert_acted(both.wrapped, way)
    assert_trade(both.wrapped)
    assert both.profiled == 3
    assert all(is_managed(block) for block in both.step(*range(6), rows=3, tokens=33).values())
    assert both.profiled == 3


class Twin(Attention):
    """Another class with the same parameters."""


class Leaky(Part):
    """Mixes tokens by attention, or where ``own`` says so by an average that no parameter shows."""

    own = False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if self.own:
            return self.finish(x, merge_heads(v.cumsum(-2) + q * k))
        return self.finish(x, merge_heads(functional.scaled_dot_product_attention(q, k, v, is_causal=True)))


@three_ways
def test_a_late_block_that_only_looks_like_the_others(way: Way) -> None:
    """It is not like them in a run, so it waits for its own first call."""
    both = Both(way, Leaky, Leaky, Leaky)
    for model in (both.plain, both.wrapped):
        model.blocks[2].own = True
    both.step(0, 1)
    assert len(plan_of(both.wrapped).blocks) == 2
    assert LATE in both.step(0, 1, 2)["blocks.2"].reason
    assert all(is_managed(block) for block in both.step(0, 1, 2).values())
    assert_trade(both.wrapped)
    assert both.profiled == 2


def test_a_block_that_does_not_come_back_is_not_waited_for_for_ever() -> None:
    both = Both(MEMO, Attention, Attention, TwoMixers, TwoMixers)
    both.step(0, 1)
    for _ in range(6):
        both.step(0, 2)
        both.step(0, 1)
    assert both.profiled <= 4


def test_a_given_plan_stays_as_it_is() -> None:
    both = Both(MEMO, Attention, Attention, TwoMixers, TwoMixers)
    both.step(0, 1)
    given = plan_of(both.wrapped)
    memo.unwrap(both.wrapped)
    memo.wrap(both.wrapped, plan=given, blocks=[*both.wrapped.blocks][:2])
    for _ in range(3):
        assert_same_losses(both)
    assert both.profiled == 0


def assert_same_losses(both: Both) -> None:
    for model in (both.plain, both.wrapped):
        model.called = (0, 1, 2)
    batch = {"x": sequence()}
    assert_same(*(run_step(model, batch, output_loss) for model in (both.wrapped, both.plain)), both.way)


def test_the_comparison_leaves_dropped_blocks_as_they_were() -> None:
    both = Both(SWAP, *([Counting] * 3))
    both.step(0, 1)
    assert [block.calls for block in both.wrapped.blocks] == [1, 1, 0]


class Counting(Attention):
    """Counts its calls in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)
