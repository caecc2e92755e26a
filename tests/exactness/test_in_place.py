"""Blocks that write into their own input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo


class InPlace(nn.Module):
    """A residual added in place to an input that autograd has not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.second(torch.sin(self.first(x * 2.0))))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.layers = nn.ModuleList(InPlace() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("policy", "alpha"), [("swap", None), ("recompute", None), ("memo", 0.5)])
def test_a_block_that_writes_into_its_input_is_swapped_and_exact(policy, alpha):
    torch.manual_seed(0)
    model, x = Tower().double(), torch.randn(2, 24, 16, dtype=torch.float64)
    want = gradients(model, x)
    memo.wrap(model, policy=policy, alpha=alpha, keep_last=0)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), want, strict=True))
    report = memo.report(model)
    assert report.totals.bytes_to_host > 0
    if policy != "swap":
        assert all("in place" in block.reason for block in report.blocks)


class InLists(nn.Module):
    """Writes to a view, as what a linear module yields is, through a list of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (one.unsqueeze(1) for one in self.into(x).chunk(3, dim=-1))
        result = self.out(nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).squeeze(1))
        torch._foreach_mul_([result], [2.0])
        return x + result


@pytest.mark.parametrize(
    ("policy", "alpha"), [("swap", None), ("recompute", None), ("memo", 0.0), ("memo", 0.5), ("replay", None),
                          ("tiled", None), ("auto", None)],
)  # fmt: skip
def test_views_that_are_written_to_in_lists(policy, alpha):
    torch.manual_seed(0)
    model, x = Tower().double(), torch.randn(2, 64, 16, dtype=torch.float64)
    model.layers = nn.ModuleList(InLists().double() for _ in range(3))
    want = gradients(model, x)
    memo.wrap(model, policy=policy, alpha=alpha, keep_last=0)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), want, strict=True))
    if policy in ("recompute", "memo"):
        assert all("loses its gradient under a dispatch mode" in block.reason for block in memo.report(model).blocks)
