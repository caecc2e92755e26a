"""Results of forward programs, written to the rows that hold them: what is left to a GEMM, and what is copied."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_rows import gapless_like, gapless_rows
from memo_runtime.records import TokenAxis
from tests.exactness.hand_written import merge_heads
from tests.execution.tiles import assert_exact, call_of

WIDTH, HEADS, TILE = 16, 4, 8


class Around(nn.Module):
    """An attention whose results in front and behind it are made in the ways that ``way`` says."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.norm = nn.LayerNorm(WIDTH)
        bias = way != "no bias"
        # The bias of keys has a gradient of zero, which no two ways of rounding agree on.
        self.query, self.key = nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH, bias=False)
        self.value = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.fused = nn.Linear(WIDTH, 3 * WIDTH)
        self.merge, self.down = nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH, bias=bias)

    def forward(self, x):
        h = x if self.way == "no norm" else self.norm(x)
        parts = self.fused(h).chunk(3, -1) if self.way == "fused" else (self.query(h), self.key(h), self.value(h))
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        if self.way == "one twice":
            value = key
        mixed = merge_heads(scaled_dot_product_attention(query, key, value, is_causal=True))
        if self.way == "product alone":
            return self.down(self.merge(mixed))
        x = x + self.merge(mixed)
        if self.way == "two products":
            return self.down(x) + self.merge(x)
        if self.way == "a column":
            return self.down(x)[..., :1].expand(-1, -1, WIDTH)
        if self.way == "wider":
            return (x + 0.5).double() + self.down(x.relu())
        result = self.down(x.relu())
        if self.way == "used again":
            return x + result, result
        return torch.add(x, result, alpha=2) if self.way == "scaled" else x + result


WAYS = (
    "plain", "no bias", "no norm", "fused", "one twice", "product alone", "two products", "wider", "used again",
    "scaled", "a column",
)  # fmt: skip


#: Of several sequences, whose rows do not lie together: each way of leaving a product, and what is copied.
BY_ROWS = ("plain", "no bias", "fused", "wider")


@pytest.mark.parametrize(("way", "batch"), [
    *((way, 1) for way in WAYS),
    *(pytest.param(way, 3, marks=() if way in BY_ROWS else pytest.mark.slow) for way in WAYS),
])  # fmt: skip
def test_all_ways_of_making_results_are_exact(way, batch):
    """Half of the tiles keep their products, the others do not."""
    torch.manual_seed(0)
    block = Around(way).double()
    x = torch.randn(batch, 3 * TILE + 5, WIDTH, dtype=torch.float64, requires_grad=True)
    assert_exact(call_of(block, x), TiledBlock(block, tile=TILE, alpha=0.5))


class Copies(TorchDispatchMode):
    """Bytes that operators copy which do nothing else, and how many products are written to what they are given."""

    def __init__(self):
        super().__init__()
        self.copied = 0
        self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket.__name__ in ("copy_", "clone"):
            self.copied += args[0].nbytes
        self.written += func in (torch.ops.aten.mm.out, torch.ops.aten.addmm.out, torch.ops.aten.addmm_.default)
        return func(*args, **(kwargs or {}))


def run_forward(way, *, batch=1, tiles=4):
    torch.manual_seed(0)
    block = Around(way).double()
    x = torch.randn(batch, tiles * TILE, WIDTH, dtype=torch.float64, requires_grad=True)
    tiled = TiledBlock(block, tile=TILE)
    tiled(x)
    with Copies() as seen:
        tiled(x)
    return seen, x.nbytes


def test_products_are_written_to_where_they_are_kept():
    """q, k and v of each tile; the result is a sum with a product without bias: what it is added to is put there."""
    seen, unit = run_forward("no bias")
    assert seen.written == 4 * 4
    assert seen.copied == unit  # the residual, which compiled programs store as they make it


def test_biased_products_too_but_not_a_sum_of_them():
    seen, unit = run_forward("plain")
    assert seen.written == 4 * 3
    assert seen.copied == unit


def test_rows_that_do_not_lie_together_are_copied():
    seen, unit = run_forward("no bias", batch=3)
    assert seen.written == 4 * 4
    assert seen.copied >= 4 * unit


def test_memory_for_rows():
    whole = torch.zeros(1, 6, 4, 3).transpose(1, 2)  # [batch, heads, tokens, depth], token-major
    part = gapless_rows(whole, TokenAxis(dim=2), 2, 4)
    assert part.shape == (1, 4, 2, 3)
    assert part.stride() == (24, 3, 12, 1)
    part.fill_(1.0)
    assert whole.sum() == 24
    assert whole[:, :, 2:4].min() == 1
    assert gapless_rows(torch.zeros(2, 6, 3), TokenAxis(dim=1), 2, 4) is None
    merged = torch.zeros(12, 3)  # tokens of two sequences in one dimension
    assert gapless_rows(merged, TokenAxis(dim=0, outer=2), 0, 2) is None
    inner = gapless_rows(merged, TokenAxis(dim=0, inner=2), 1, 3)
    assert inner.data_ptr() == merged[2:].data_ptr()
    assert inner.shape == (4, 3)
    assert gapless_like(whole.narrow(2, 0, 2), torch.device("cpu")).stride() == (24, 3, 12, 1)
