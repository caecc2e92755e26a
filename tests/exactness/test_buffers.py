"""Blocks whose forward writes to their buffers: a rerun starts from the same buffers and does not count twice."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo


class Spectral(nn.Module):
    """Weights from a power iteration that every forward continues."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
        self.second = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.first(x) + torch.tanh(self.second(x))


class Statistics(nn.Module):
    """Running statistics over the batch and all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(torch.tanh(self.linear(x)).transpose(1, 2)).transpose(1, 2)


class Running(nn.Module):
    """A running scale that every forward writes to in place and then divides by, so that autograd saves it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("scale", torch.ones(16, dtype=torch.float64))

    def written(self, x: Tensor) -> Tensor:
        self.scale.mul_(0.9).add_(x.detach().abs().mean((0, 1)), alpha=0.1)
        return self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x / self.written(x)))


class Aliased(Running):
    """What is written to and what is read are two buffers with the same memory, and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("front", self.scale[:8])

    def written(self, x: Tensor) -> Tensor:
        self.front[2:6].mul_(0.9).add_(x.detach().abs().mean((0, 1))[2:6], alpha=0.1)
        return self.scale


class Tower(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.layers = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", [Spectral, Statistics])
@pytest.mark.parametrize("tokens", [24, 3])
@pytest.mark.parametrize(("policy", "alpha"), [("swap", None), ("recompute", None), ("memo", 0.5)])
def test_gradients_and_buffers_are_those_of_the_unwrapped_model(kind, tokens, policy, alpha):
    torch.manual_seed(0)
    plain, x = Tower(kind).double(), torch.randn(2, tokens, 16, dtype=torch.float64)
    model = memo.wrap(copy.deepcopy(plain), policy=policy, alpha=alpha, keep_last=0)
    for _ in range(3):
        for each in (plain, model):
            each.zero_grad(set_to_none=True)
            each(x).square().sum().backward()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert torch.linalg.vector_norm(p.grad - q.grad) <= 1e-12 * torch.linalg.vector_norm(p.grad) + 1e-14
        for (name, a), b in zip(plain.named_buffers(), model.buffers(), strict=True):
            assert torch.equal(a, b), name


#: All that blocks can take; tiles leave such blocks to reruns.
POLICIES = [
    ("swap", {}), ("recompute", {}), ("memo", {"alpha": 0.5}), ("replay", {"alpha": 0.0}), ("tiled", {"tile": 8}),
]  # fmt: skip


@pytest.mark.parametrize("kind", [Running, Aliased])
@pytest.mark.parametrize(("policy", "settings"), POLICIES, ids=[policy for policy, _ in POLICIES])
def test_a_buffer_may_be_written_to_and_read_behind_that(kind, policy, settings):
    torch.manual_seed(0)
    plain = Tower(kind).double()
    kept = {} if policy == "tiled" else {"keep_last": 0}
    model = copy.deepcopy(plain)
    for layer in model.layers if kind is Aliased else ():
        layer.front = layer.scale[:8]  # the copy has the memory in common, and counts writes apart
    memo.wrap(model, policy=policy, **settings, **kept)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (plain, model)]
    for step in range(3):
        x = torch.randn(2, 24 + step, 16, dtype=torch.float64)
        losses = [each(x).square().sum() for each in (plain, model)]
        assert torch.equal(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert torch.linalg.vector_norm(p.grad - q.grad) <= 1e-12 * torch.linalg.vector_norm(p.grad) + 1e-14
            q.grad.copy_(p.grad)
        for (name, a), b in zip(plain.named_buffers(), model.buffers(), strict=True):
            assert torch.equal(a, b), name
        for optimizer in optimizers:
            optimizer.step()


def of_buffers(model: nn.Module, asked: Callable[[Tensor], object]) -> dict[str, object]:
    return {name: asked(buffer) for name, buffer in model.named_buffers()}


def running() -> tuple[nn.Module, Tensor]:
    """A wrapped tower and its loss, behind a step that was profiled."""
    torch.manual_seed(0)
    model, x = Tower(Running).double(), torch.randn(2, 24, 16, dtype=torch.float64)
    memo.wrap(model, policy="recompute", keep_last=0)
    model(x).square().sum().backward()
    model.zero_grad()
    return model, model(x).square().sum()


def test_reruns_leave_values_and_versions_as_they_were():
    model, loss = running()
    view = model.layers[0].scale[2:]
    values, versions = of_buffers(model, torch.clone), of_buffers(model, lambda buffer: buffer._version)
    for _ in range(2):
        loss.backward(retain_graph=True)
        assert of_buffers(model, lambda buffer: buffer._version) == versions
        assert view._version == versions["layers.0.scale"]
        assert all(torch.equal(value, model.get_buffer(name)) for name, value in values.items())


@pytest.mark.parametrize("again", [False, True])
def test_what_somebody_else_writes_between_forward_and_backward_is_an_error_as_it_is_unwrapped(again):
    """Also behind a rerun, which hides no more than what it has written itself."""
    model, loss = running()
    if again:
        loss.backward(retain_graph=True)
    model.layers[0].scale[3:].add_(1.0)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*'layers\.0' used"):
        loss.backward()


def test_a_rerun_that_fails_leaves_them_too(monkeypatch):
    model, loss = running()
    values, versions = of_buffers(model, torch.clone), of_buffers(model, lambda buffer: buffer._version)
    written = Running.written

    def fails(block: Running, x: Tensor) -> Tensor:
        written(block, x)
        raise ValueError("not again")

    monkeypatch.setattr(Running, "written", fails)
    with pytest.raises(memo.MemoError, match="not again"):
        loss.backward(retain_graph=True)
    assert of_buffers(model, lambda buffer: buffer._version) == versions
    assert all(torch.equal(value, model.get_buffer(name)) for name, value in values.items())
    monkeypatch.setattr(Running, "written", written)
    loss.backward()
