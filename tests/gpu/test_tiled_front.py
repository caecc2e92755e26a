"""torch.nn's own layers by tiles on CUDA: tokens in front or not, dropout in fused kernels, an encoder's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memo_runtime.execution.tiled import TiledBlock
from tests.execution.tiles import call_of, run, worst

pytestmark = pytest.mark.gpu
_WIDTH, _TOKENS, _ROWS = 128, 301, 3


def made(kind: type[nn.Module], **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    block: nn.Module = kind(_WIDTH, 2, 256, device="cuda", dtype=torch.bfloat16, activation="gelu", **settings)
    return block


def hidden(tokens: int, batch_first: bool) -> Tensor:
    x = torch.randn(_ROWS, tokens, _WIDTH, device="cuda", dtype=torch.bfloat16)
    return (x if batch_first else x.transpose(0, 1).contiguous()).requires_grad_()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_layer(batch_first: bool, masked: bool) -> None:
    block = made(nn.TransformerEncoderLayer, dropout=0.0, batch_first=batch_first)
    call = call_of(block, hidden(_TOKENS, batch_first))
    if masked:
        call.kwargs["src_key_padding_mask"] = torch.zeros(_ROWS, _TOKENS, dtype=torch.bool, device="cuda")
        call.kwargs["src_key_padding_mask"][-1, -40:] = True
    tiled = TiledBlock(block, tile=64, alpha=0.5)
    mine, theirs = run(call, tiled), run(call, block)
    assert worst(mine[0], theirs[0]) < 2e-2
    assert worst(mine[1], theirs[1]) < 5e-2
    assert tiled.kernels[0] in (("efficient",) if masked else ("cudnn", "flash", "efficient"))


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_decoder_layer_that_drops(batch_first: bool) -> None:
    """Capturing compares it under the masks that its tiles drew; one seed yields one result and its gradients."""
    block = made(nn.TransformerDecoderLayer, dropout=0.1, batch_first=batch_first)
    call = call_of(block, hidden(_TOKENS, batch_first), hidden(77, batch_first))
    tiled = TiledBlock(block, tile=64, alpha=0.5)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(run(call, tiled))
    assert len(tiled.kernels) == 2
    assert worst(results[0][0], results[1][0]) == 0.0
    assert worst(results[0][1], results[1][1]) < 1e-2  # kernels add in any order
    assert worst(results[0][0], results[2][0]) > 1e-2
