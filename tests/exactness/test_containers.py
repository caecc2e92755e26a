"""Blocks that write into a list or dict that they are given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo


class Appending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, states: list[Tensor]) -> Tensor:
        states.append(functional.gelu(self.linear(torch.stack(states).mean(0))))
        return states[-1]


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor, memory: dict[str, Tensor]) -> Tensor:
        y = functional.gelu(self.linear(x + memory["last"]))
        memory["last"] = y * 0.3
        return x + y


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Appending() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for layer in self.layers:
            layer(states)
        return torch.stack(states).square().sum()


class Dicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Remembering() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        memory = {"last": torch.zeros_like(x)}
        for layer in self.layers:
            x = layer(x, memory)
        return x.square().sum()


@pytest.mark.parametrize("kind", [Lists, Dicts])
@pytest.mark.parametrize(("policy", "alpha"), [("swap", None), ("recompute", None), ("memo", 0.37)])
def test_the_callers_own_container_is_passed(kind, policy, alpha):
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(2, 96, 16, dtype=torch.float64)

    def step() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad(set_to_none=True)
        loss = model(x)
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()]

    loss, want = step()
    memo.wrap(model, policy=policy, alpha=alpha, keep_last=0)
    for _ in range(2):
        wrapped_loss, got = step()
        assert torch.equal(wrapped_loss, loss)
        for a, b in zip(got, want, strict=True):
            assert torch.linalg.vector_norm(a - b) <= 1e-12 * torch.linalg.vector_norm(b)
