"""Blocks that call autograd in their forward: energies and forces, inner training steps, checkpoints."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import memo_runtime as memo
from memo_runtime.records import Executor

WIDTH = 16
#: A swap of everything copies what memo copies, and reruns nothing of what these tests are about.
WAYS = [pytest.param("swap", None, marks=pytest.mark.slow), ("recompute", None), ("memo", 0.37)]
ways = pytest.mark.parametrize(("policy", "alpha"), WAYS)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.mix(x))


class Force(Part):
    """Moves along the gradient of an energy, and that gradient has one."""

    def forward(self, x: Tensor) -> Tensor:
        energy = self.mlp(self.mix(x)).square().sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return x - 0.1 * force


class DrawnForce(Part):
    """The same with dropout in the energy."""

    def forward(self, x: Tensor) -> Tensor:
        energy = self.mlp(functional.dropout(x, 0.2)).square().sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return x - 0.1 * force


class Guided(Part):
    """Takes a gradient that is a constant to the outer step."""

    def forward(self, x: Tensor) -> Tensor:
        start = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.mlp(start).square().sum(), start)
        return x + self.mlp(self.mix(x)) - 0.1 * slope


class Later(Part):
    """Calls autograd from the second step on."""

    calls_autograd = False

    def forward(self, x: Tensor) -> Tensor:
        energy = self.mlp(self.mix(x)).square().sum()
        if self.calls_autograd:
            return x - torch.autograd.grad(energy, x, create_graph=True)[0]
        return x - energy / x.numel()


class Backward(Part):
    """Leaves gradients in its own parameters."""

    def forward(self, x: Tensor) -> Tensor:
        start = x.detach().requires_grad_()
        self.mlp(start).square().sum().backward()
        return x + self.mlp(self.mix(x)) - 0.1 * start.grad


class Checkpointed(Part):
    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.mlp, self.mix(x), use_reentrant=False)


class Tower(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class Potential(Tower):
    """An energy by the whole stack, whose forces are in the loss."""

    def forward(self, x: Tensor) -> Tensor:
        place = x.detach().requires_grad_()
        energy = super().forward(place)
        (force,) = torch.autograd.grad(energy, place, create_graph=True)
        return energy + force.square().sum()


def tower(kind: type[nn.Module], outer: type[Tower] = Tower) -> Tower:
    torch.manual_seed(0)
    return outer(kind).double()


def sequence(seed: int = 1) -> Tensor:
    return torch.randn(2, 40, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def backward(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    model(sequence(seed)).backward()


def assert_same(
    plain: nn.Module, model: nn.Module, *, equal: bool, step: Callable[[nn.Module, int], None] = backward
) -> None:
    for seed in range(2):
        for each in (plain, model):
            each.zero_grad(set_to_none=True)
            step(each, seed)
        for want, got in zip(plain.parameters(), model.parameters(), strict=True):
            if want.grad is None or equal:
                assert (want.grad is None) == (got.grad is None)
                assert want.grad is None or torch.equal(want.grad, got.grad)
            else:
                gap = torch.linalg.vector_norm(want.grad - got.grad)
                assert gap <= 1e-12 * torch.linalg.vector_norm(want.grad)
    totals = memo.report(model).totals
    assert (totals.stash_bytes, totals.host_bytes_in_use) == (0, 0)


@ways
@pytest.mark.parametrize("kind", [Force, DrawnForce, Guided])
def test_it_runs_again_as_a_whole(kind, policy, alpha, caplog):
    plain = tower(kind)
    model = memo.wrap(copy.deepcopy(plain), policy=policy, alpha=alpha, keep_last=0)
    with caplog.at_level(logging.WARNING, logger="memo_runtime"):
        assert_same(plain, model, equal=policy == "swap")
    blocks = memo.report(model).blocks
    if policy == "swap":
        assert [(block.executor, block.alpha) for block in blocks] == [(Executor.REPLAY, 1.0)] * 3
    else:
        assert [block.executor for block in blocks] == [Executor.RECOMPUTE] * 3
        assert all("calls autograd itself" in block.reason for block in blocks)
        assert all(block.recomputed_flops > 0 for block in blocks)
        assert sum("calls autograd itself" in record.getMessage() for record in caplog.records) == 1


@ways
def test_one_that_leaves_gradients_is_not_run_again(policy, alpha):
    plain = tower(Backward)
    model = memo.wrap(copy.deepcopy(plain), policy=policy, alpha=alpha, keep_last=0)
    for each in (plain, model):  # those that are there when the first step profiles stay too
        each.layers[0].up.weight.grad = torch.ones_like(each.layers[0].up.weight)
        backward(each, 5)
    assert torch.equal(plain.layers[0].up.weight.grad, model.layers[0].up.weight.grad)
    assert_same(plain, model, equal=True)
    for block in memo.report(model).blocks:
        assert (block.executor, block.alpha, block.recomputed_flops) == (Executor.REPLAY, 1.0, 0)
        assert policy == "swap" or "nothing of it is run again" in block.reason


@ways
def test_one_that_starts_later(policy, alpha):
    plain = tower(Later)
    model = memo.wrap(copy.deepcopy(plain), policy=policy, alpha=alpha, keep_last=0)
    assert_same(plain, model, equal=policy == "swap")
    for each in (plain, model):
        for layer in each.layers:
            layer.calls_autograd = True
    assert_same(plain, model, equal=True)
    assert [block.alpha for block in memo.report(model).blocks] == [1.0] * 3
    if policy != "swap":
        assert all("did not when it was profiled" in block.reason for block in memo.report(model).blocks)


@ways
def test_a_checkpoint_inside(policy, alpha):
    plain = tower(Checkpointed)
    model = memo.wrap(copy.deepcopy(plain), policy=policy, alpha=alpha, keep_last=0)
    assert_same(plain, model, equal=policy == "swap")


@ways
def test_forces_of_the_whole_stack(policy, alpha):
    plain = tower(Part, Potential)
    model = memo.wrap(copy.deepcopy(plain), policy=policy, alpha=alpha, keep_last=0)
    assert_same(plain, model, equal=policy == "swap")


@ways
def test_a_forward_that_was_given_up_can_still_go_backward(policy, alpha):
    def step(model: nn.Module, seed: int) -> None:
        inside: list[Tensor] = []

        def give_up(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            inside.append(output)
            raise InterruptedError

        if seed:
            handle = model.layers[1].up.register_forward_hook(give_up)
            with pytest.raises(InterruptedError):
                model(sequence(seed))
            handle.remove()
            inside[0].square().sum().backward()
        else:
            backward(model, seed)

    plain = tower(Part)
    model = memo.wrap(copy.deepcopy(plain), policy=policy, alpha=alpha, keep_last=0)
    assert_same(plain, model, equal=policy == "swap", step=step)
