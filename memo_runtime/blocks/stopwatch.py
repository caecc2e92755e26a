"""Seconds of one run on an idle device, of runs that follow each other without a pause, and of what a step runs.

A GPU at its power limit sets its clock by the work it has just done: products of matrices run faster after a pause than
in a step, and attention alone runs faster than beside them. So what is timed for a forecast runs behind the same kind
of work, and beside what it runs with in a step.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

#: Attention is timed at this many tokens at most, and continued by the square of the length: keys and values of one
#: head are far beyond any cache by then, and two million tokens would take minutes before the first step.
LONGEST_ATTENTION = 2**19
#: The same work before timed rounds, and most rounds of it.
_LOAD_SECONDS, _MOST_LOAD = {"cuda": 0.5}, 500
#: Timed rounds.
_SAMPLES = 3
#: A round that takes longer is its own load, and is timed once.
_LONG_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Beside:
    """Work that a step runs beside what is timed: ``run`` does that of ``tokens`` tokens."""

    tokens: int
    run: Callable[[], object]

    def runs(self, tokens: float) -> list[Callable[[], object]]:
        """That of about ``tokens`` tokens."""
        return [self.run] * max(1, round(tokens / self.tokens))


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


def typical(
    runs: Sequence[Callable[[], object]], device: torch.device, timed: Sequence[int] = (0,), *, together: bool = False
) -> list[float]:
    """Median seconds of those of ``runs`` with the numbers ``timed``, in rounds of all, on a device at work.

    The first round, in which libraries choose kernels and programs are compiled, is no sample.

    Args:
        together: other ranks do the same, so that the number of rounds may not depend on how long they take.
    """
    size = len(runs)
    if together:
        found = laps([*runs] * (1 + _SAMPLES), device)[size:]
    else:
        laps(runs, device)
        found = laps(runs, device)
        if sum(found) <= _LONG_SECONDS:
            load = min(_MOST_LOAD, math.ceil(_LOAD_SECONDS.get(device.type, 0.0) / max(sum(found), 1e-9)))
            found = laps([*runs] * (load + _SAMPLES), device)[load * size :]
    return [statistics.median(found[number % size :: size]) for number in timed]
