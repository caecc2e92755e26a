"""What a profile leaves in memory: nothing, where the bytes in use are the base of every forecast."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import memo_runtime as memo
from memo_runtime.execution.tiled_block import Tiling
from memo_runtime.profiling import model as profiling
from memo_runtime.profiling import timing
from tests.api.towers import tower
from tests.tiny import few_samples

__all__ = ["few_samples"]


def test_no_result_of_the_pass_is_alive_when_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    own = Tiling.made

    def watched(self: Tiling, block: Any, output: Any) -> Any:
        result = own(self, block, output)
        made.extend(weakref.ref(one) for one in (output, result))
        return result

    def measured(_: object) -> int:
        gc.collect()
        alive.append(sum(one() is not None for one in made))
        return 0

    monkeypatch.setattr(Tiling, "made", watched)
    monkeypatch.setattr(profiling, "allocated_after", measured)
    found = memo.profile(tower(3), (torch.randn(1, 16, 8, dtype=torch.float64),), tiles=True)
    assert [block.tiled.chained for block in found.blocks if block.tiled is not None] == [False, True, True]
    assert made
    assert alive == [0]


def test_no_timer_waits_for_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """With work beside, which a GPU has."""
    timers: list[weakref.ref[Any]] = []
    own = timing._Timer.attention

    def watched(self: Any, lengths: Any) -> Any:
        timers.append(weakref.ref(self.start))
        self.beside = timing.Beside(8, lambda: self.crop(8))
        return own(self, lengths)

    monkeypatch.setattr(timing._Timer, "attention", watched)
    gc.disable()
    try:
        memo.profile(tower(2), (torch.randn(1, 16, 8, dtype=torch.float64),))
        assert timers
        assert all(one() is None for one in timers)
    finally:
        gc.enable()
