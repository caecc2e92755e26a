"""Backward passes that take only a part, and outputs that are no plain tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from tests.execution.test_inner_autograd import WAYS, Part, Tower, sequence, tower


class Generated(Part):
    def forward(self, x: Tensor) -> Iterator[Tensor]:
        output = super().forward(x)
        return (part for part in (output,))


class Sparse(Part):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 16, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.table(torch.arange(x.shape[1]) % 5))


class Unpacking(Tower):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            (x,) = layer(x)
        return x.square().mean()


def some_inputs(model: nn.Module) -> None:
    wanted = [model.layers[1].up.weight, model.layers[0].down.bias]
    for parameter, gradient in zip(wanted, torch.autograd.grad(model(sequence()), wanted), strict=True):
        parameter.grad = gradient


def one_part_after_another(model: nn.Module) -> None:
    loss = model(sequence())
    loss.backward(inputs=[model.layers[2].up.weight], retain_graph=True)
    loss.backward(inputs=[model.layers[0].up.weight])


def penalty(model: nn.Module) -> None:
    x = sequence().requires_grad_()
    (slope,) = torch.autograd.grad(model(x), x, create_graph=True)
    slope.square().sum().backward()


def plain_backward(model: nn.Module) -> None:
    model(sequence()).backward()


CASES: dict[str, tuple[type[Tower], type[nn.Module], Callable[[nn.Module], None]]] = {
    "some inputs": (Tower, Part, some_inputs),
    "in parts": (Tower, Part, one_part_after_another),
    "gradient penalty": (Tower, Part, penalty),
    "a generator": (Unpacking, Generated, plain_backward),
    "sparse gradients": (Tower, Sparse, plain_backward),
}


@pytest.mark.parametrize(("policy", "alpha"), WAYS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_unwrapped_model(case, policy, alpha):
    outer, kind, step = CASES[case]
    plain = tower(kind, outer)
    model = memo.wrap(copy.deepcopy(plain), policy=policy, alpha=alpha, keep_last=0)
    for _ in range(2):
        for each in (plain, model):
            each.zero_grad(set_to_none=True)
            step(each)
        for want, got in zip(plain.parameters(), model.parameters(), strict=True):
            assert (want.grad is None) == (got.grad is None)
            if want.grad is not None:
                a, b = want.grad.to_dense(), got.grad.to_dense()
                assert torch.linalg.vector_norm(a - b) <= 1e-12 * torch.linalg.vector_norm(a)
    totals = memo.report(model).totals
    assert (totals.stash_bytes, totals.host_bytes_in_use) == (0, 0)
