"""Blocks that take as many rows of a table as there are tokens: it may end soon, or with the sequence."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import memo_runtime as memo
from memo_runtime.blocks.ambient import AutocastState
from memo_runtime.blocks.call import BlockCall
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_growth import polynomial_within
from memo_runtime.execution.tiled_weights import weights_backward_bytes
from tests.exactness.hand_written import HEADS, WIDTH, Part, merge_heads
from tests.execution.tiles import assert_exact, call_of

TOKENS = 24


class Places(Part):
    """Learned positions, added to the input."""

    def __init__(self, rows):
        super().__init__()
        self.table = nn.Parameter(0.1 * torch.randn(rows, WIDTH))

    def forward(self, x):
        q, k, v = self.heads(x + self.table[: x.shape[1]])
        return self.finish(x, merge_heads(scaled_dot_product_attention(q, k, v, is_causal=True)))


class OfSeveral(Places):
    """The same for sequences beside each other."""

    def __init__(self, rows):
        super().__init__(rows)
        self.table = nn.Parameter(0.1 * torch.randn(1, rows, WIDTH))

    def forward(self, x):
        q, k, v = self.heads(x + self.table[:, : x.shape[1]])
        return self.finish(x, merge_heads(scaled_dot_product_attention(q, k, v, is_causal=True)))


class Bias(Part):
    """A learned bias of every pair of tokens."""

    def __init__(self, rows):
        super().__init__()
        self.table = nn.Parameter(torch.randn(HEADS, rows, rows))

    def forward(self, x):
        q, k, v = self.heads(x)
        bias = self.table[:, : x.shape[1], : x.shape[1]]
        return self.finish(x, merge_heads(scaled_dot_product_attention(q, k, v, attn_mask=bias)))


class Mask(Part):
    """A buffer as a causal mask, and attention that is written out."""

    def __init__(self, rows):
        super().__init__()
        self.register_buffer("mask", torch.ones(rows, rows, dtype=torch.bool).tril()[None, None])

    def forward(self, x):
        q, k, v = self.heads(x)
        seen = self.mask[:, :, : x.shape[1], : x.shape[1]]
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
        return self.finish(x, merge_heads(scores.softmax(-1) @ v))


class EndsElsewhere(Mask):
    """Where the sequence is as long as the table it computes something else."""

    def forward(self, x):
        rows = self.mask[:, :, : x.shape[1], : x.shape[1]].shape[-1]
        return super().forward(x) * (2.0 if rows == self.mask.shape[-1] else 1.0)


def double(kind, rows):
    torch.manual_seed(0)
    return kind(rows).double().train()


def hidden(tokens=TOKENS):
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("rows", [TOKENS, 2 * TOKENS + 3])
@pytest.mark.parametrize("kind", [Places, OfSeveral, Bias, Mask], ids=lambda kind: kind.__name__)
def test_exact(kind, rows):
    block = double(kind, rows)
    assert_exact(call_of(block, hidden().requires_grad_()), TiledBlock(block, tile=8))


@pytest.mark.parametrize(
    ("kind", "rows"), [(Places, TOKENS), (Places, 2 * TOKENS + 3), (Bias, 2 * TOKENS - 1), (Mask, TOKENS)]
)
def test_a_model_of_them_is_planned_by_tiles(kind, rows):
    torch.manual_seed(0)
    model = memo.wrap(nn.Sequential(*[kind(rows) for _ in range(2)]).double(), policy="tiled", strict=True)
    model(hidden()).square().mean().backward()
    assert {block.executor for block in memo.report(model).blocks} == {"tiled"}


@pytest.mark.parametrize("rows", [TOKENS, 2 * TOKENS + 3, 9 * TOKENS])
@pytest.mark.parametrize("kind", [Places, Bias], ids=lambda kind: kind.__name__)
def test_what_backward_through_a_table_takes_is_told_within_it(kind, rows):
    call = BlockCall.of((hidden().requires_grad_(),), {})
    found = TiledBlock(double(kind, rows), tile=8).captured(call)
    size = partial(weights_backward_bytes, found, autocast=AutocastState.current("cpu"))
    growth = polynomial_within(size, TOKENS, found.traced.allows)
    for tokens in (8, 16, TOKENS):
        assert growth.exact(tokens) == pytest.approx(size(tokens))
    assert size(TOKENS) >= size(8) > 0


def test_lengths_that_are_not_allowed_are_not_asked_for():
    def size(tokens):
        assert allows(tokens)
        return 3.0 + 5 * tokens + 7 * tokens**2

    for allows in (lambda n: True, lambda n: n <= 64, lambda n: n <= 100 and n % 16 == 0):
        growth = polynomial_within(size, 64, allows)
        assert (growth.constant, growth.linear, growth.quadratic) == pytest.approx((3, 5, 7))
    allows = {64}.__contains__
    assert polynomial_within(size, 64, allows).exact(64) == size(64)


def test_what_is_another_way_at_the_end_of_the_table_is_refused():
    block = double(EndsElsewhere, TOKENS)
    with pytest.raises(CaptureRefusedError, match=f"another way for {TOKENS} tokens"):
        TiledBlock(block, tile=8)(hidden().requires_grad_())
    shorter = hidden(TOKENS - 3).requires_grad_()
    assert_exact(call_of(block, shorter), TiledBlock(block, tile=8))
