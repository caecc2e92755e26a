"""A tiny hand-written model; nothing but torch, so that processes of a test start quickly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

HIDDEN = 32
#: Everything that wrap may be asked for, with no block left alone.
POLICIES: dict[str, dict[str, Any]] = {
    "swap": {"policy": "swap", "keep_last": 0},
    "recompute": {"policy": "recompute", "keep_last": 0},
    "memo": {"policy": "memo", "alpha": 0.37, "keep_last": 0},
}
BOUND = 1e-12


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 48), nn.SiLU(), nn.Linear(48, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        q, k, v = (
            part.view(rows, tokens, 4, HIDDEN // 4).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, tokens, HIDDEN))
        return x + self.mlp(x)


class Tower(nn.Module):
    """A stack of blocks between two linear layers."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(8, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.last = nn.Linear(HIDDEN, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def tower(blocks: int = 3, *, dtype: torch.dtype = torch.float64) -> Tower:
    """The same weights at every call."""
    torch.manual_seed(0)
    return Tower(blocks).to(dtype)


def signal(tokens: int = 24, rows: int = 2, *, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """A batch for a tower."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, 8, generator=generator, dtype=torch.float64).to(dtype)
