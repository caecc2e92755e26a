"""Blocks whose forward writes to their buffers: a rerun starts from the same buffers and does not count twice."""

from __future__ import annotations

import copy

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
