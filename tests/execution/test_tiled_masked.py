"""A block whose attention is under spans, by tiles: exact, timed, and with what its operator saves."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from memo_runtime.blocks import stopwatch
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.spans import spans_tensor
from memo_runtime.execution import tiled_timing
from memo_runtime.execution.mixers.masked import masked_attention
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_profile import tiled_profile
from memo_runtime.execution.tiled_timing import time_tiles
from tests.execution.tiles import assert_exact, call_of

WIDTH, HEADS = 16, 4


class Windowed(nn.Module):
    """Heads of queries share one head of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key_value = nn.Linear(WIDTH, 2 * WIDTH // HEADS)

    def forward(self, x: Tensor, spans: Tensor) -> Tensor:
        heads = partial(torch.Tensor.unflatten, dim=-1, sizes=(-1, WIDTH // HEADS))
        query, both = heads(self.query(x)).transpose(1, 2), heads(self.key_value(x)).transpose(1, 2)
        key, value = both.split(1, dim=1)
        return x + self.out(masked_attention(query, key, value, spans).transpose(1, 2).flatten(2))


def block_and_call(tokens: int = 70, rows: int = 2) -> tuple[Windowed, Tensor, Tensor]:
    torch.manual_seed(0)
    places = torch.arange(tokens).expand(rows, -1)
    x = torch.randn(rows, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    return Windowed().double(), x, spans_tensor((places - 9).clamp(min=0), places + 1)


def test_it_is_the_block():
    block, x, spans = block_and_call()
    tiles = TiledBlock(block, tile=16, alpha=0.5)
    assert_exact(call_of(block, x, spans), tiles)
    assert tiles.kernels == ["memo_runtime::masked_attention"]


def test_its_attention_is_timed_under_the_spans_of_the_call_and_grows_with_tokens(monkeypatch):
    block, x, spans = block_and_call()
    tiles, call = TiledBlock(block, tile=16), BlockCall.of((x, spans), {})
    captured = tiles.captured(call)
    seen = []

    def laps(runs, device):
        for run in runs:
            run()
        return [1.0] * len(runs)

    own = tiled_timing._Masked.seconds
    monkeypatch.setattr(stopwatch, "laps", laps)
    monkeypatch.setattr(tiled_timing, "longest_tile", lambda rows: 16)
    monkeypatch.setattr(
        tiled_timing._Masked, "seconds", lambda self, call, _: seen.append(call.leaves[1].shape[2]) or own(self, call)
    )
    found = time_tiles(tiles, captured, call)
    assert found is not None
    assert seen[0] == 70
    assert all(length < 70 for length in seen[1:])
    assert found.forward.quadratic == found.backward.quadratic == 0.0
    assert found.forward.linear >= 1 / 70
    profile = tiled_profile(captured, call, found)
    assert profile.attention == ("memo_runtime::masked_attention",)
    # The input, the output of attention, and the log-sum-exp of each head.
    assert sorted(size.at(70) for size in profile.stash) == [2 * 4 * 70 * 8, 2 * 70 * WIDTH * 8, 2 * 70 * WIDTH * 8]
