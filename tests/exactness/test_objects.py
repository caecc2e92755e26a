"""Blocks that take and yield their tensors inside objects: dataclasses, named tuples, outputs of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

import memo_runtime as memo
from memo_runtime.records import Executor
from tests.exactness.compare import MEMO, OTHER_WAYS, SWAP, Way, assert_gradients, output_loss, run_step
from tests.exactness.hand_written import WIDTH, Attention, sequence


@dataclass
class Plain:
    hidden: Tensor
    scale: Any = 0.5
    note: str = "as it came"


@dataclass(frozen=True)
class Frozen:
    hidden: Tensor
    scale: Any = 0.5
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Slotted:
    hidden: Tensor
    scale: Any = 0.5


class Named(NamedTuple):
    hidden: Tensor
    scale: Any = 0.5


@dataclass
class Output(ModelOutput):
    hidden: Tensor | None = None
    scale: Any = None


KINDS: dict[str, Callable[..., Any]] = {
    "plain": Plain,
    "frozen": Frozen,
    "slotted": Slotted,
    "named": Named,
    "output": Output,
    "inside": lambda hidden, scale: Frozen(hidden * 1.0, scale, more={"all": [Plain(hidden), Named(hidden)]}),
}


class Taking(Attention):
    """Takes an object with the hidden state and a mask of its own, and yields another one."""

    make: Callable[..., Any]

    def forward(self, state: Any) -> Any:
        hidden = state.hidden
        if getattr(state, "more", None):
            hidden = hidden + 0.1 * state.more["all"][0].hidden
        return type(self).make(super().forward(hidden) * state.scale, state.scale)


class Writing(Attention):
    """Leaves its result in the object that it was given."""

    def forward(self, state: Plain) -> Plain:
        state.hidden = super().forward(state.hidden) * state.scale
        return state


class Objects(nn.Module):
    def __init__(self, block: type[nn.Module], make: Callable[..., Any]) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        state = self.make(x, x.detach()[..., :1].sigmoid())
        for block in self.blocks:
            state = block(state)
        hidden: Tensor = state.hidden
        return hidden


def objects(kind: str) -> Objects:
    torch.manual_seed(0)
    if kind == "writing":
        return Objects(Writing, Plain).double()
    return Objects(type("Taking", (Taking,), {"make": staticmethod(KINDS[kind])}), KINDS[kind]).double()


@pytest.mark.parametrize("way", OTHER_WAYS, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "writing"])
def test_tensors_inside_objects_are_managed(kind: str, way: Way) -> None:
    model, batch = objects(kind), {"x": sequence()}
    want = run_step(model, batch, output_loss)
    way.wrap(model, strict=True)
    for _ in range(2):
        got = run_step(model, batch, output_loss)
        assert torch.equal(got.loss, want.loss)
        assert_gradients(got.gradients, want.gradients, way)
    report = memo.report(model)
    assert {block.executor for block in report.blocks} == {Executor.REPLAY}
    assert all(block.bytes_to_host for block in report.blocks)
    assert all(bool(block.recomputed_flops) == (way is not SWAP) for block in report.blocks)
    assert report.totals.bytes_to_host == report.totals.forecast.bytes_to_host


@pytest.mark.parametrize(
    "kind", ["plain", *(pytest.param(one, marks=pytest.mark.slow) for one in ("slotted", "output")), "writing"]
)
def test_by_tiles(kind: str) -> None:
    """What a block writes into an object that it is given is no result of a graph: such a block is run by replay."""
    model, batch = objects(kind), {"x": sequence()}
    want = run_step(model, batch, output_loss)
    memo.wrap(model, policy="tiled", alpha=0.5, keep_last=0, tile=16, loss="native")
    for _ in range(2):
        assert_gradients(run_step(model, batch, output_loss).gradients, want.gradients, MEMO)
    executor, reason = (Executor.REPLAY, "writes to") if kind == "writing" else (Executor.TILED, "")
    for block in memo.report(model).blocks:
        assert block.executor is executor
        assert reason in block.reason
