"""Blocks that cannot be managed are left as they are, with the reason in the report, and train as they did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.errors import BlockFallbackError
from memo_runtime.records import Executor
from memo_runtime.reports import Report
from tests.exactness import hand_written as blocks
from tests.exactness.compare import MAIN_WAYS, MEMO, SWAP, assert_gradients, output_loss, run_step
from tests.tiny import few_samples

__all__ = ["few_samples"]


class Branch(blocks.NoMixer):
    """A higher-order operator, which traces its branches on tensors without elements."""

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,))
        return super().forward(x) * gate


class OwnError(Exception):
    """What a library raises that has errors of its own."""


class Choosy(blocks.NoMixer):
    """Takes a whole sequence and raises what nobody expects for a part of it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < 33:
            raise OwnError("not so few tokens")
        return super().forward(x)


class Later(blocks.NoMixer):
    """Returns a generator: the work is done by who reads it."""

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        return (super(Later, self).forward(part) for part in (x,))


class State:
    """No container, and nobody knows what else it is."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Boxed(blocks.NoMixer):
    """Takes and returns an object."""

    def forward(self, state: State) -> State:
        return State(super().forward(state.hidden))


class Tower(nn.Module):
    def __init__(self, kind: type[nn.Module], call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Linear(blocks.WIDTH, blocks.WIDTH)
        self.blocks = nn.ModuleList(kind() for _ in range(3))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = self.call(block, x)
        return x


UNMANAGED = {
    "cond": (Branch, lambda block, x: block(x), "the higher-order operator cond has its branches"),
    "generator": (Later, lambda block, x: next(iter(block(x))), "returns a generator: its work comes after it"),
    "object": (Boxed, lambda block, x: block(State(x)).hidden, "tensors inside a State are not seen"),
}


def tower(kind: type[nn.Module], call: Any) -> Tower:
    torch.manual_seed(0)
    return Tower(kind, call).double()


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
@pytest.mark.parametrize("case", UNMANAGED)
def test_left_as_they_are_with_the_reason(case: str, way: Any, caplog: pytest.LogCaptureFixture) -> None:
    kind, call, reason = UNMANAGED[case]
    model, batch = tower(kind, call), {"x": blocks.sequence()}
    want = run_step(model, batch, output_loss)
    way.wrap(model)
    for _ in range(2):
        assert_gradients(run_step(model, batch, output_loss).gradients, want.gradients, SWAP)
    report = memo.report(model)
    assert {block.executor for block in report.blocks} == {Executor.NATIVE}
    assert all(reason in block.reason for block in report.blocks)
    assert reason in caplog.text


@pytest.mark.parametrize("case", UNMANAGED)
def test_strict_refuses_them_and_says_what_works(case: str) -> None:
    kind, call, reason = UNMANAGED[case]
    model = tower(kind, call)
    memo.wrap(model, policy="swap", keep_last=0, strict=True)
    with pytest.raises(BlockFallbackError) as caught:
        model(blocks.sequence())
    assert reason in str(caught.value)
    assert "strict=False, which leaves such blocks as they are" in str(caught.value)
    assert "policy='swap'" not in str(caught.value)


def trained(kind: type[nn.Module], tokens: int, way: Any) -> Report:
    """The report of a stack of ``kind`` that went two steps with the gradients of the unwrapped one, and swapped."""
    model, batch = blocks.stack_of(kind), {"x": blocks.sequence(tokens=tokens)}
    want = run_step(model, batch, output_loss)
    way.wrap(model)
    for _ in range(2):
        assert_gradients(run_step(model, batch, output_loss).gradients, want.gradients, way)
    report = memo.report(model)
    assert all(block.bytes_to_host for block in report.blocks)
    return report


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
def test_any_error_on_fewer_tokens_is_a_reason(way: Any) -> None:
    report = trained(Choosy, 33, way)
    if way is MEMO:
        assert all("OwnError: not so few tokens" in block.reason for block in report.blocks)


def test_no_memory_left_is_no_reason() -> None:
    class Hungry(blocks.NoMixer):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] < 33:
                raise torch.OutOfMemoryError("no memory left")
            return super().forward(x)

    model = MEMO.wrap(blocks.stack_of(Hungry))
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        model(blocks.sequence(tokens=33))


class Patches(nn.Module):
    """A convolution over an image: with its result at hand a slice of its channels is rebuilt, and none runs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
def test_a_block_that_runs_on_no_crop_is_timed_at_its_own_length(way: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Patches() for _ in range(3))).double()
    image = torch.randn(2, 8, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(image).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    want = gradients()
    memo.wrap(model, policy=way.policy, alpha=way.alpha, keep_last=0)
    for _ in range(2):
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(gradients(), want, strict=True))
    assert all(block.executor == Executor.REPLAY and block.bytes_to_host for block in memo.report(model).blocks)


class Uneven(blocks.NoMixer):
    """Takes sequences of some lengths alone, as a scan in chunks may."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 20:
            raise OwnError("not twenty tokens")
        return super().forward(x)


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
def test_a_block_of_which_some_slices_do_not_run_is_managed(way: Any) -> None:
    """Of 40 tokens, slices of 25 and of 20 are looked at."""
    report = trained(Uneven, 40, way)
    assert all("slices of other lengths do not run: OwnError: not twenty" in b.reason for b in report.blocks) == (
        way is MEMO
    )
