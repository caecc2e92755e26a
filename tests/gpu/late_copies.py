"""Copies that begin late by random times, as on a machine whose link is busy."""

from __future__ import annotations

import random

import pytest
import torch

from memo_runtime.execution.stash import Tools

#: Most cycles that one direction waits before one submission.
_CYCLES = 1_000_000


def make_copies_late(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both streams of the engine of ``tools`` wait before every submission."""
    draw, submit = random.Random(3), tools.engine._submit
    handles = [tools.engine.stream_handle(to_host=out) for out in (True, False)]
    streams = [torch.cuda.ExternalStream(handle, device=tools.engine.device) for handle in handles]

    def late(*args):
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(draw.randrange(_CYCLES))
        return submit(*args)

    monkeypatch.setattr(tools.engine, "_submit", late)
