"""torch.nn's own Transformer layers: both layouts, both places of the norm, both kinds of mask, dropout on."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.exactness.compare import MAIN_WAYS, MEMO, SWAP, WAYS, Way, assert_exact, output_loss


def stack(*, batch_first: bool, norm_first: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        32, 4, 48, dropout=0.1, batch_first=batch_first, norm_first=norm_first, dtype=torch.float64
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def batch(*, batch_first: bool, mask: str, rows: int = 3, tokens: int = 21) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    src = torch.randn(rows, tokens, 32, generator=generator, dtype=torch.float64)
    inputs: dict[str, Any] = {"src": src if batch_first else src.transpose(0, 1).contiguous()}
    if mask == "padding":
        padding = torch.zeros(rows, tokens, dtype=torch.bool)
        padding[-1, -4:] = True
        inputs["src_key_padding_mask"] = padding
    if mask == "causal":
        inputs["mask"] = nn.Transformer.generate_square_subsequent_mask(tokens, dtype=torch.float64)
        inputs["is_causal"] = True
    return inputs


@pytest.mark.parametrize("way", [*MAIN_WAYS, *WAYS[3:]], ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_every_policy(batch_first: bool, norm_first: bool, way: Way) -> None:
    model = stack(batch_first=batch_first, norm_first=norm_first)
    assert_exact(model, batch(batch_first=batch_first, mask="none"), way, loss_of=output_loss)


def most_pairs(count: int) -> Any:
    """All of ``count`` layouts and places, and a mask: in CI each pair of two of them, the rest slow."""
    cases = []
    for flags in itertools.product([False, True], repeat=count):
        for mask in ("padding", "causal"):
            even = (sum(flags) + (mask == "causal")) % 2 == 0
            cases.append(pytest.param(*flags, mask, marks=() if even else pytest.mark.slow))
    return cases


@pytest.mark.parametrize(("batch_first", "norm_first", "mask"), most_pairs(2))
def test_masks(batch_first: bool, norm_first: bool, mask: str) -> None:
    model = stack(batch_first=batch_first, norm_first=norm_first)
    assert_exact(model, batch(batch_first=batch_first, mask=mask), MEMO, loss_of=output_loss)


@pytest.mark.parametrize(("batch_first", "mask"), most_pairs(1))
def test_one_row(batch_first: bool, mask: str) -> None:
    model = stack(batch_first=batch_first, norm_first=True)
    inputs = batch(batch_first=batch_first, mask=mask, rows=1, tokens=33)
    assert_exact(model, inputs, MEMO, loss_of=output_loss)


@pytest.mark.parametrize("way", [SWAP, MEMO], ids=str)
def test_evaluation_mode_with_gradients(way: Way) -> None:
    model = stack(batch_first=True, norm_first=False).eval()
    assert_exact(model, batch(batch_first=True, mask="padding"), way, loss_of=output_loss)


@pytest.mark.parametrize("way", [SWAP, MEMO], ids=str)
def test_encoder_and_decoder(way: Way) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 2, 2, 48, dropout=0.1, batch_first=True, dtype=torch.float64)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, src: Tensor, tgt: Tensor, tgt_mask: Tensor) -> Tensor:
            return self.inner(src, tgt, tgt_mask=tgt_mask)

    generator = torch.Generator().manual_seed(1)
    src, tgt = (torch.randn(2, n, 32, generator=generator, dtype=torch.float64) for n in (21, 13))
    mask = nn.Transformer.generate_square_subsequent_mask(13, dtype=torch.float64)
    assert_exact(Named(), {"src": src, "tgt": tgt, "tgt_mask": mask}, way, loss_of=output_loss)
