"""Gradients that reach a block by tiles may lie in memory in any way, and a tile may have one token."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from memo_runtime.execution.tiled import TiledBlock

WIDTH, KEYS = 16, 12


class Looks(nn.Module):
    """Yields its attention's weights, the mean of all heads, whose gradient is expanded to each of them."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x, memory):
        mixed, weights = self.attention(x, memory, memory)
        return x + mixed, weights


class Heads(nn.Module):
    """Attention of a sequence with itself, and another result that is made token by token."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, memory):
        query, key = (one.unflatten(-1, (2, -1)).transpose(1, 2) for one in (self.query(x), self.key(x)))
        mixed = scaled_dot_product_attention(query, key, query, is_causal=True)
        return x + mixed.transpose(1, 2).flatten(2) + memory.mean((0, 1)), self.query(x)


def as_they_are(one):
    return one.square()


def expanded(one):
    return one.sum()


def transposed(one):
    return one.transpose(0, 1).contiguous().square() * torch.linspace(0, 1, one.shape[-1], dtype=one.dtype)


def features_outermost(one):
    return one.permute(2, 0, 1).contiguous().square()


def some_rows(one):
    return one[:, ::3].square()


WAYS = [as_they_are, expanded, transposed, features_outermost, some_rows]


@pytest.mark.parametrize(("tokens", "tile"), [(17, 16), (18, 16), (5, 1)])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", [Looks, Heads], ids=lambda kind: kind.__name__)
def test_exact(kind, way, tokens, tile):
    torch.manual_seed(0)
    block = kind().double()
    x, memory = (torch.randn(2, count, WIDTH, dtype=torch.float64, requires_grad=True) for count in (tokens, KEYS))
    wanted = [x, *block.parameters(), memory]

    def gradients(forward):
        return torch.autograd.grad(sum(way(one).sum() for one in forward(x, memory)), wanted)

    for mine, theirs in zip(gradients(TiledBlock(block, tile=tile)), gradients(block), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
