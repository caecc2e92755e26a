"""One training step of a model as it is, the same step wrapped, and what must hold between the two.

The forward of a wrapped block is the block's own, so losses are equal to the last bit under every policy; gradients
are equal where nothing is run again and agree to 1e-12 where a token slice is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

import memo_runtime as memo
from memo_runtime.lookup import find_wrapped
from memo_runtime.records import Executor, Plan
from memo_runtime.reports import Report

TOLERANCE = 1e-12
TRADE = ("bytes_to_host", "bytes_to_device", "bytes_kept", "recomputed_flops")

#: Parameters whose gradient is zero but for rounding (the bias of keys) are measured against all gradients together.
_SMALL = 1e-6

LossOf = Callable[[nn.Module, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Way:
    """What is asked of ``wrap``."""

    policy: str
    alpha: float | None = None

    def __str__(self) -> str:
        return self.policy if self.alpha is None else f"{self.policy}-{self.alpha:g}"

    @property
    def fraction(self) -> float:
        """Share of tokens that is not rebuilt."""
        return {"swap": 1.0, "recompute": 0.0}.get(self.policy, self.alpha or 0.0)

    @property
    def equal(self) -> bool:
        """Nothing is run again: gradients are equal to the last bit."""
        return self.fraction == 1.0

    def wrap(self, model: nn.Module, **changes: Any) -> nn.Module:
        """Wrap ``model`` with every block managed and the loss as it is."""
        settings = {"policy": self.policy, "alpha": self.alpha, "keep_last": 0, "loss": "native"}
        return memo.wrap(model, **(settings | changes))


SWAP = Way("swap")
RECOMPUTE = Way("recompute")
MEMO = Way("memo", 0.37)
#: Nearly recompute and swap, and slow tests.
ENDS = (Way("memo", 0.0), Way("memo", 1.0))
#: Every way.
WAYS = (SWAP, RECOMPUTE, MEMO, *(pytest.param(way, marks=pytest.mark.slow) for way in ENDS))
#: For what is tried in other settings: memo copies and runs again, so that a swap of everything adds little.
MAIN_WAYS = (pytest.param(SWAP, marks=pytest.mark.slow), RECOMPUTE, MEMO)
#: For what has nothing to do with how much of a block is run again.
OTHER_WAYS = (*(pytest.param(way, marks=pytest.mark.slow) for way in (SWAP, RECOMPUTE)), MEMO)


@dataclass
class Step:
    """Loss and gradients of one step; ``inputs`` are those of batch tensors that require one."""

    loss: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss of a Hugging Face model."""
    return model(**batch).loss


def weighted(output: Any) -> Tensor:
    """A loss in which every element of every floating-point tensor of ``output`` has its own weight."""
    total = torch.zeros((), dtype=torch.float64)
    for number, leaf in enumerate(_pytree.tree_leaves(output)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            generator = torch.Generator().manual_seed(number)
            weights = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            total = total + (leaf.double() * weights).mean() + 0.5 * (leaf.double() ** 2 * weights).mean()
    return total


def output_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """A loss over everything that a model yields."""
    return weighted(model(**batch))


def take_gradients(model: nn.Module, batch: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Gradients by name, of parameters and of batch tensors that have one; cleared afterwards."""
    named = dict(model.named_parameters())
    named |= {f"batch.{name}": value for name, value in (batch or {}).items() if isinstance(value, Tensor)}
    found = {name: value.grad for name, value in named.items() if value.grad is not None}
    for value in named.values():
        value.grad = None
    return found


def run_step(model: nn.Module, batch: Mapping[str, Any], loss_of: LossOf = model_loss, *, seed: int = 3) -> Step:
    """One forward and backward with random numbers from ``seed``."""
    torch.manual_seed(seed)
    loss = loss_of(model, batch)
    loss.backward()
    return Step(loss.detach(), take_gradients(model, batch))


def relative_error(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """Largest relative L2 error: of all gradients together, and of each."""
    assert got.keys() == want.keys()
    total = sum(float(value.double().norm()) ** 2 for value in want.values()) ** 0.5
    errors = {name: float((got[name].double() - value.double()).norm()) for name, value in want.items()}
    together = sum(error**2 for error in errors.values()) ** 0.5 / total
    each = (errors[name] / max(float(value.double().norm()), _SMALL * total) for name, value in want.items())
    return max(together, *each)


def assert_gradients(got: Mapping[str, Tensor], want: Mapping[str, Tensor], way: Way) -> None:
    """Equal where ``way`` runs nothing again, else within the tolerance; and the same tensors have one."""
    assert want, "the step gave no gradients at all"
    assert got.keys() == want.keys()
    if way.equal:
        assert [name for name in want if not torch.equal(got[name], want[name])] == []
    assert relative_error(got, want) <= TOLERANCE


def assert_same(got: Step, want: Step, way: Way) -> None:
    """``got`` is the step ``want``."""
    assert torch.equal(got.loss, want.loss)
    assert_gradients(got.gradients, want.gradients, way)


def plan_of(model: nn.Module) -> Plan:
    """The plan in force in a wrapped model."""
    wrapped = find_wrapped(model)
    assert wrapped is not None
    assert wrapped.session.plan is not None
    return wrapped.session.plan


def assert_trade(model: nn.Module, *, times: int = 1) -> None:
    """Every block moved, kept and spent what its plan says, to the byte; ``times`` calls and backward passes."""
    plan, report = plan_of(model), memo.report(model)
    assert [block.name for block in report.blocks] == [block.name for block in plan.blocks]
    for done, planned in zip(report.blocks, plan.blocks, strict=True):
        got = {name: getattr(done, name) for name in TRADE}
        assert got == {name: times * getattr(planned, name) for name in TRADE}, done.name
        assert done.executor == planned.executor
        assert done.alpha == planned.alpha


def assert_acted(
    model: nn.Module, way: Way, *, fallback: str = "", executor: Executor = Executor.REPLAY, flops: bool = True
) -> Report:
    """Every block was managed and did something.

    ``fallback`` is part of the reason why a prefix was not possible, ``executor`` what ran instead; ``flops``: a
    rerun has matrix products to count.
    """
    report = memo.report(model)
    split = 0.0 < way.fraction < 1.0
    for block in report.blocks:
        assert block.bytes_to_host > 0, block.name
        assert block.bytes_to_device == block.bytes_to_host, block.name
        assert (block.recomputed_flops > 0) == (flops and way.fraction < 1.0), block.name
        if fallback and split:
            assert fallback in block.reason
            assert block.alpha == 0.0
        elif executor == Executor.REPLAY or way.equal:
            assert block.reason == ""
            assert abs(block.alpha - way.fraction) < (0.15 if split else 1e-9)
        assert block.executor == (Executor.REPLAY if way.equal else executor), block.name
    if fallback and split:
        assert any(fallback in note for note in report.notes)
    return report


def assert_clean(model: nn.Module) -> None:
    """Nothing of the last step is held any more."""
    totals = memo.report(model).totals
    assert (totals.stash_bytes, totals.host_bytes_in_use, totals.open_copies) == (0, 0, 0)


def assert_exact(
    model: nn.Module, batch: Mapping[str, Any], way: Way, *, loss_of: LossOf = model_loss,
    blocks: Any = None, fallback: str = "", executor: Executor = Executor.REPLAY, flops: bool = True,
) -> Report:  # fmt: skip
    """Steps of ``model``, wrapped, against one before it was wrapped; leaves it wrapped."""
    want = run_step(model, batch, loss_of)
    way.wrap(model, blocks=blocks)
    for _ in range(2):
        assert_same(run_step(model, batch, loss_of), want, way)
    report = assert_acted(model, way, fallback=fallback, executor=executor, flops=flops)
    assert_trade(model)
    assert_clean(model)
    return report
