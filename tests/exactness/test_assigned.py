"""Blocks that assign to their buffers, parameters and modules: tiles refuse them by name, and reruns leave no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.blocks.call import BlockCall
from memo_runtime.capture.captured import capture
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.records import Executor

WIDTH = 16


class Block(nn.Module):
    """A layer behind ``changed``, which assigns."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("first", torch.ones(WIDTH, dtype=torch.float64))
        self.register_buffer("second", torch.full((WIDTH,), 2.0, dtype=torch.float64))
        self.register_buffer("late", None)
        self.inner = nn.BatchNorm1d(WIDTH, affine=False)

    def changed(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.one(self.changed(x)) * self.scale)


def mean(x: Tensor) -> Tensor:
    return x.detach().abs().mean((0, 1))


class Counts(Block):
    """Counts calls, and reads nothing of it."""

    def changed(self, x: Tensor) -> Tensor:
        self.first = self.first + 1
        return x


class Running(Block):
    """Read before and behind, so that autograd saves both."""

    def changed(self, x: Tensor) -> Tensor:
        x = x / self.first
        self.first = 0.9 * self.first + 0.1 * mean(x)
        return x / self.first


class ByTable(Block):
    def changed(self, x: Tensor) -> Tensor:
        self._buffers["first"] = 0.9 * self.first + 0.1 * mean(x)
        return x / self.first


class OfAModule(Block):
    def changed(self, x: Tensor) -> Tensor:
        self.inner.running_var = 0.9 * self.inner.running_var + 0.1 * mean(x)
        return x / self.inner.running_var


class Exchanges(Block):
    """Two buffers of one shape."""

    def changed(self, x: Tensor) -> Tensor:
        self.first, self.second = self.second, self.first
        return x / self.first


class ExchangesModules(Block):
    def changed(self, x: Tensor) -> Tensor:
        self.one, self.other = self.other, self.one
        return x


class AnotherParameter(Block):
    def changed(self, x: Tensor) -> Tensor:
        self.scale = nn.Parameter(0.9 * self.scale.detach())
        return x


class OtherElements(Block):
    def changed(self, x: Tensor) -> Tensor:
        self.first.data = 0.9 * self.first.data
        return x / self.first


class OtherElementsOfAParameter(Block):
    def changed(self, x: Tensor) -> Tensor:
        self.scale.data = nn.functional.normalize(self.scale.data, dim=0)
        return x


class WhereNoneWas(Block):
    def changed(self, x: Tensor) -> Tensor:
        if self.late is None:
            self.late = torch.full((WIDTH,), 1.5, dtype=x.dtype)
        return x * self.late


class ExchangesAndWrites(Block):
    def changed(self, x: Tensor) -> Tensor:
        self.first, self.second = self.second, self.first
        self.first.mul_(0.9).add_(mean(x), alpha=0.1)
        return x / self.first


ASSIGN = {
    Counts: "buffer 'first'",
    Running: "buffer 'first'",
    ByTable: "buffer 'first'",
    OfAModule: "buffer 'inner.running_var'",
    Exchanges: "buffer 'first'",
    ExchangesModules: "module 'one'",
    AnotherParameter: "parameter 'scale'",
    OtherElements: "buffer 'first'",
    OtherElementsOfAParameter: "parameter 'scale'",
    WhereNoneWas: "buffer 'late'",
    ExchangesAndWrites: "buffer 'first'",
}
POLICIES = [
    ("swap", {}), ("recompute", {}), ("memo", {"alpha": 0.5}), ("replay", {"alpha": 0.0}), ("tiled", {"tile": 8}),
]  # fmt: skip


class Tower(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(kind() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


def assert_equal(plain: nn.Module, model: nn.Module) -> None:
    """Gradients, and every tensor under the name that it has."""
    assert [*dict(plain.named_parameters())] == [*dict(model.named_parameters())]
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert torch.linalg.vector_norm(p.grad - q.grad) <= 1e-12 * torch.linalg.vector_norm(p.grad) + 1e-14, name
            q.grad.copy_(p.grad)
        assert torch.equal(p, q), name
    assert [*dict(plain.named_buffers())] == [*dict(model.named_buffers())]
    for (name, a), b in zip(plain.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ASSIGN, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("policy", "settings"), POLICIES, ids=[policy for policy, _ in POLICIES])
def test_steps_are_those_of_the_unwrapped_model(kind, policy, settings):
    torch.manual_seed(0)
    plain = Tower(kind).double()
    kept = {} if policy == "tiled" else {"keep_last": 0}
    model = memo.wrap(copy.deepcopy(plain), policy=policy, **settings, **kept)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (plain, model)]
    for step in range(3):
        x = torch.randn(2, 24 + step, WIDTH, dtype=torch.float64)
        losses = [each(x).square().sum() for each in (plain, model)]
        assert torch.equal(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        assert_equal(plain, model)
        for optimizer in optimizers:
            optimizer.step()
    if policy == "tiled":
        assert all(block.executor != Executor.TILED and block.reason for block in memo.report(model).blocks)


def members(block: nn.Module) -> dict[str, int]:
    found = (*block.named_parameters(), *block.named_buffers(), *block.named_modules())
    return {name: id(one) for name, one in found}


def call() -> BlockCall:
    return BlockCall.of((torch.randn(2, 29, WIDTH, dtype=torch.float64, requires_grad=True),), {})


@pytest.mark.parametrize("kind", ASSIGN, ids=lambda kind: kind.__name__)
def test_a_capture_refuses_what_is_assigned_by_name_and_leaves_it(kind):
    block = kind().double()
    before = members(block)
    with pytest.raises(CaptureRefusedError) as caught:
        capture(block, call())
    assert caught.value.operator == ASSIGN[kind]
    assert members(block) == before


class Itself(Block):
    """What is there when it is done is what was there before."""

    def changed(self, x: Tensor) -> Tensor:
        first = self.first
        self.first = 2 * first
        x = x * self.first
        self.first, self.second, self.one = first, self.second.to(x), self.one
        return x


def test_a_tensor_that_is_there_again_when_the_forward_is_done_is_not_refused():
    assert capture(Itself().double(), call()).outputs
