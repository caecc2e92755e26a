"""Attention whose queries, keys and values are not those that fused kernels take."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution import tiled as tiled_module
from memo_runtime.execution.tiled import TiledBlock
from tests.exactness.hand_written import HEADS, WIDTH, Attention, Part, merge_heads
from tests.execution.tiles import assert_exact, call_of

TOKENS = 21


class OneHead(Part):
    """Without a dimension of heads; ``mask``: of how many dimensions, 0 for causal."""

    mask = 0

    def forward(self, x):
        q, k, v = self.project(self.norm(x)).chunk(3, -1)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril() if self.mask else None
        seen = seen.expand(len(x), -1, -1) if self.mask == 3 else seen
        return self.finish(x, scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=not self.mask))


class Merged(Part):
    """Heads merged with sequences."""

    def forward(self, x):
        q, k, v = (one.flatten(0, 1) for one in self.heads(x))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.finish(x, merge_heads(mixed.unflatten(0, (-1, HEADS))))


class OneForAll(Part):
    """Keys of one head for all, and without ``enable_gqa``; ``sequences``: of one sequence too."""

    sequences = False

    def forward(self, x):
        q, k, v = self.heads(x)
        k, v = (k[:1], v[:1]) if self.sequences else (k[:, :1], v[:, :1])
        return self.finish(x, merge_heads(scaled_dot_product_attention(q, k, v, is_causal=True)))


class KeysOfOne(OneForAll):
    """Their values have other heads."""

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.finish(x, merge_heads(scaled_dot_product_attention(q, k[:, :1], v, is_causal=True)))


class Five(Part):
    """Heads in two dimensions."""

    def forward(self, x):
        q, k, v = (one.unflatten(1, (2, -1)) for one in self.heads(x))
        return self.finish(x, merge_heads(scaled_dot_product_attention(q, k, v, is_causal=True).flatten(1, 2)))


def double(kind):
    torch.manual_seed(0)
    return kind().double().train()


def hidden():
    x = torch.randn(3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.requires_grad_()


@pytest.mark.parametrize("mask", [0, 2, 3])
def test_one_head(mask):
    block = double(OneHead)
    block.mask = mask
    tiled = TiledBlock(block, tile=8)
    assert_exact(call_of(block, hidden()), tiled)
    assert tiled.kernels == ["cpu"]


@pytest.mark.parametrize("kind", [Merged, OneForAll])
def test_other_heads(kind):
    block = double(kind)
    assert_exact(call_of(block, hidden()), TiledBlock(block, tile=8))


def of_one_sequence():
    block = double(OneForAll)
    block.sequences = True
    return block


@pytest.mark.parametrize("make", [of_one_sequence, lambda: double(KeysOfOne), lambda: double(Five)])
def test_what_no_kernel_takes_is_refused(make):
    with pytest.raises(CaptureRefusedError, match=r"attention: fused kernels take \[batch, heads, tokens, size\]"):
        TiledBlock(make(), tile=8)(hidden())


def test_a_capture_that_does_not_run_is_refused(monkeypatch):
    """Whatever is wrong with it, the block has its own forward."""

    def fails(*_):
        raise RuntimeError("this kernel takes something else")

    monkeypatch.setattr(tiled_module, "_checked_run", fails)
    with pytest.raises(CaptureRefusedError, match="check: its forward fails: RuntimeError: this kernel takes"):
        TiledBlock(double(Attention), tile=8)(hidden())
