"""Blocks whose tokens are in front of their sequences, [T, B, H]: ``batch_first=False``, the default of torch.nn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.records import Executor
from tests.exactness.compare import plan_of
from tests.exactness.test_tiled import assert_tiled
from tests.execution.test_tiled_encoder import TOKENS, WIDTH, inputs, layer
from tests.execution.tiles import assert_exact, call_of


def encoder(**changes: Any) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(layer(dropout=0.0, batch_first=False, **changes), 2, enable_nested_tensor=False)


@pytest.mark.parametrize(
    ("rows", "mask", "norm_first"),
    [
        (24, "causal", False),
        pytest.param(3, "padding", True, marks=pytest.mark.slow), pytest.param(1, "none", True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_model(rows: int, mask: str, norm_first: bool) -> None:
    """Tiles are of tokens, also where the batch is large enough to be taken for a sequence, and where it is one."""
    batch = inputs(mask, rows=rows, tokens=21, batch_first=False)
    batch["mask"] = batch.pop("src_mask", None)
    model = encoder(norm_first=norm_first, activation="gelu")
    report = assert_tiled(model, batch)
    assert {block.tokens for block in plan_of(model).blocks} == {21}
    assert {block.attention for block in report.blocks} == {("cpu",)}


@pytest.mark.parametrize(("kind", "batch_first"), [
    ("added, padding", True), ("of heads", False),
    *(pytest.param(*one, marks=pytest.mark.slow)
      for one in (("added", True), ("added", False), ("added, padding", False), ("of heads", True))),
])  # fmt: skip
def test_masks_that_are_added(kind: str, batch_first: bool) -> None:
    """As many numbers as tokens in two dimensions: no features that are as many by chance."""
    given = inputs("causal", batch_first=batch_first)
    del given["is_causal"]
    if "padding" in kind:
        padding = inputs("padding")["src_key_padding_mask"]
        given["src_key_padding_mask"] = torch.zeros(padding.shape, dtype=torch.float64).masked_fill(padding, -torch.inf)
    if "heads" in kind:
        given["src_mask"] = given["src_mask"].expand(12, -1, -1).contiguous()
    block = layer(dropout=0.0, batch_first=batch_first)
    tiled = TiledBlock(block, tile=8, alpha=0.5)
    assert_exact(call_of(block, **given), tiled)
    assert tiled.kernels == ["cpu"]


def test_dropout() -> None:
    """The check compares with the block under the masks that its tiles drew: it passes, or raises."""
    torch.manual_seed(0)
    block = nn.TransformerDecoderLayer(WIDTH, 4, 48, dropout=0.1, dtype=torch.float64)
    tiled = TiledBlock(block, tile=8)
    x = inputs("none", batch_first=False)["src"]
    tiled(x, torch.randn(13, 3, WIDTH, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert tiled.kernels == ["rows", "rows"]


class Weighing(nn.Module):
    """Attention that is written out, since its weights are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=True)[0]


class AmongHeads(nn.Module):
    """Attention inside each token."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)) for part in self.project(x).chunk(3, dim=-1))
        return x + functional.scaled_dot_product_attention(q, k, v).flatten(-2)


@pytest.mark.parametrize(("kind", "dim", "mixers"), [(Weighing, 0, 1), (AmongHeads, 1, 0)])
def test_where_tokens_are_is_what_attention_says(kind: type[nn.Module], dim: int, mixers: int) -> None:
    block = kind()
    tiled = TiledBlock(block, tile=8)
    x = torch.randn(TOKENS, 11, WIDTH, dtype=torch.float64, requires_grad=True)
    assert_exact(call_of(block, x), tiled)
    ((_, captured),) = tiled._captures
    assert (captured.token_dim, captured.mixers) == (dim, mixers)


def test_a_block_whose_tiles_are_of_other_tokens_than_its_profile_is_refused() -> None:
    """Nothing could be planned for it: three sequences of 29 tokens, of which none meets another."""
    model = nn.Sequential(AmongHeads(), AmongHeads())
    memo.wrap(model, policy="tiled", tile=8, keep_last=0, loss="native", blocks=["0", "1"])
    model(torch.randn(TOKENS, 3, WIDTH, dtype=torch.float64)).sum().backward()
    for block in memo.report(model).blocks:
        assert block.executor == Executor.REPLAY
        assert "the 3 tokens in dimension 1 of its input, and its profile is of the 29 in dimension 0" in block.reason


def test_a_mask_that_cannot_be_told_apart_is_refused() -> None:
    """As many sequences as tokens: which dimension of the padding is which no size says."""
    given = inputs("padding", rows=21, tokens=21, batch_first=False)
    with pytest.raises(CaptureRefusedError, match="along the first dimension of its input"):
        TiledBlock(layer(dropout=0.0, batch_first=False), tile=8)(**given)


class Decoder(nn.Module):
    """Attention to tokens of its own and to others."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.batch = 0 if settings["batch_first"] else 1
        made = (nn.TransformerDecoderLayer(WIDTH, 4, 48, dtype=torch.float64, **settings) for _ in range(2))
        self.layers = nn.ModuleList(made)
        self.other = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, src: Tensor) -> Tensor:
        tokens = src.shape[1 - self.batch]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens, dtype=src.dtype)
        memory = self.other(src.narrow(1 - self.batch, 0, 13))
        for one in self.layers:
            src = one(src, memory, tgt_mask=mask, tgt_is_causal=True)
        return src


@pytest.mark.slow
@pytest.mark.parametrize(("batch_first", "dropout"), [(True, 0.0), (False, 0.0), (True, 0.1), (False, 0.1)])
def test_decoders(batch_first: bool, dropout: float) -> None:
    torch.manual_seed(0)
    model = Decoder(batch_first=batch_first, dropout=dropout, activation="gelu")
    batch = inputs("none", tokens=21, batch_first=batch_first)
    if dropout == 0.0:
        assert_tiled(model, batch)
        return
    memo.wrap(model, policy="tiled", tile=8, alpha=0.5, keep_last=0, loss="native")
    model(**batch).square().mean().backward()
    found = memo.report(model).blocks
    assert {block.executor for block in found} == {Executor.TILED}
    assert {block.attention for block in found} == {("rows", "rows")}
