"""On a GPU reruns are compared with their forward once: later steps must be right by themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.errors import StateChangedError

pytestmark = pytest.mark.gpu

RERUNS = [("recompute", None), ("memo", 0.37)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.dropout, self.scale, self.last = nn.Dropout(0.2), 1.0, None

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.down(self.dropout(functional.gelu(self.up(x) * self.scale)))
        self.last = y
        return y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Linear(64, 64), nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def _attributes(model: Model) -> None:
    for layer in model.layers:
        layer.scale = 2.0


def _evaluation(model: Model) -> None:
    model.eval()


def _weights(model: Model) -> None:
    for layer in model.layers:
        layer.up.bias = nn.Parameter(torch.ones_like(layer.up.bias))


@pytest.mark.parametrize("change", [_attributes, _evaluation, _weights], ids=lambda change: change.__name__)
@pytest.mark.parametrize(("policy", "alpha"), RERUNS)
def test_changes_between_forward_and_backward_in_a_later_step(change: Callable[[Model], None], policy, alpha):
    torch.manual_seed(0)
    plain = Model().cuda().double()
    wrapped = memo.wrap(copy.deepcopy(plain), policy=policy, alpha=alpha, keep_last=0)
    x, found = torch.randn(2, 700, 64, device="cuda", dtype=torch.float64), []
    for model in (plain, wrapped):
        for _ in range(2):
            model(x).backward()
        model.zero_grad(set_to_none=True)
        weights = dict(model.named_parameters())
        torch.manual_seed(1)
        loss = model(x)
        change(model)
        last = [layer.last for layer in model.layers]
        loss.backward()
        assert all(layer.last is tensor for layer, tensor in zip(model.layers, last, strict=True))
        found.append([p.grad for p in weights.values()])
    for a, b in zip(*found, strict=True):
        assert torch.linalg.vector_norm(a - b) <= 1e-12 * torch.linalg.vector_norm(a)


@pytest.mark.parametrize(("policy", "alpha"), RERUNS)
def test_elements_exchanged_in_a_later_step_are_an_error(policy, alpha):
    torch.manual_seed(0)
    model = memo.wrap(Model().cuda(), policy=policy, alpha=alpha, keep_last=0)
    x = torch.randn(2, 700, 64, device="cuda")
    for _ in range(2):
        model(x).backward()
    loss = model(x)
    model.layers[1].up.bias.data = torch.ones(128, device="cuda")
    with pytest.raises(StateChangedError, match=r"layers\.1\.up\.bias"):
        loss.backward()
