"""Attention under spans is timed at the length that it will have, under the spans of the call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.blocks.spans import dense_mask, spans_tensor
from memo_runtime.execution.mixers.masked import masked_attention
from memo_runtime.profiling import mixers, timing

WIDTH = 8


class Windowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
        heads = self.mix(x).unflatten(-1, (2, -1)).transpose(1, 2)
        return x + masked_attention(heads, heads, heads, spans).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Windowed(), Windowed()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1]).expand(len(x), -1)
        spans = spans_tensor((places - 9).clamp(min=0), places + 1)
        for layer in self.layers:
            x = layer(x, spans)
        return x


def test_it_is_timed_at_the_length_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    run = mixers._result

    def watched(record, tensors):
        spans, query = record.args[3], tensors[0]
        assert spans.shape[2] == query.shape[2]
        assert len(spans) == len(query) == 3
        seen[query.shape[2]] = int(dense_mask(spans, query.shape[2]).sum())
        return run(record, tensors)

    monkeypatch.setattr(mixers, "_result", watched)
    block = memo.profile(Model().double(), (torch.randn(3, 640, WIDTH, dtype=torch.float64),)).blocks[0]
    assert block.sliceable
    assert list(seen) == [128, 256, 512, 640]
    assert seen[640] == 3 * (640 * 10 - 45)


def test_its_time_is_a_line_in_the_tokens() -> None:
    samples = [timing._Sample(n, 1.0 + 0.7 * n, 0.0, 0.0) for n in (10, 20, 40)]
    at = {n: 0.2 * n for n in (10, 20, 40)} | {160: 0.3 * 160}
    growth = timing._seconds(samples, lambda sample: sample.forward, at, by_token=True)
    assert growth.exact(160) == pytest.approx(1.0 + 0.5 * 160 + 0.3 * 160)
    assert growth.exact(320) == pytest.approx(1.0 + 0.8 * 320)
