"""Seconds of one run on an idle device, and of runs that follow each other without a pause."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch


def synchronize(device: torch.device) -> None:
    """Wait for ``device``; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of ``run``, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def laps(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Seconds of each of ``runs``, one behind the other; a GPU is never idle in between, if it is the slower side.

    A GPU that waits between runs has a higher clock than in a step, where nothing waits.
    """
    if device.type != "cuda":
        return [seconds_of(run, device) for run in runs]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
    stream = torch.cuda.current_stream(device)
    synchronize(device)
    marks[0].record(stream)
    for run, mark in zip(runs, marks[1:], strict=True):
        run()
        mark.record(stream)
    synchronize(device)
    return [before.elapsed_time(after) / 1000.0 for before, after in pairwise(marks)]
