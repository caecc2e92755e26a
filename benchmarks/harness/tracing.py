"""One steady step as a Chrome trace, and how much of its copies compute did not hide.

A copy between host and device is hidden while a kernel runs. What is left of the copies, both directions together, is
what the step waited for or could have waited for; a gap without either is not counted.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.contenders.base import Contender

Span = tuple[float, float]
_MICRO = 1e6


def traced_step(contender: Contender, path: Path) -> dict[str, Any]:
    """Run one step of ``contender`` under the profiler, write its trace to ``path``, and say what its copies took."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if contender.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        contender.step()
        if contender.device.type == "cuda":
            torch.cuda.synchronize(contender.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(path))
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return {"file": path.name, **copy_times(events)}


def copy_times(events: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Seconds of copies between host and device in ``events``, those of them without a kernel, and these as a share."""
    kernels: list[Span] = []
    copies: list[Span] = []
    for event in events:
        span = (float(event.get("ts", 0)), float(event.get("ts", 0)) + float(event.get("dur", 0)))
        if event.get("cat") == "kernel":
            kernels.append(span)
        elif event.get("cat") == "gpu_memcpy" and ("HtoD" in event["name"] or "DtoH" in event["name"]):
            copies.append(span)
    copying = joined(copies)
    total = sum(stop - start for start, stop in copying)
    alone = total - shared(copying, joined(kernels))
    return {
        "copy_seconds": total / _MICRO,
        "exposed_seconds": alone / _MICRO,
        "exposed_share": alone / total if total else None,
    }


def joined(spans: Iterable[Span]) -> list[Span]:
    """The same time as spans that do not overlap, in order."""
    found: list[Span] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def shared(first: Sequence[Span], second: Sequence[Span]) -> float:
    """Time in both; each in order and without overlaps."""
    total, at = 0.0, 0
    for start, stop in first:
        while at < len(second) and second[at][1] <= start:
            at += 1
        each = at
        while each < len(second) and second[each][0] < stop:
            total += min(stop, second[each][1]) - max(start, second[each][0])
            each += 1
    return total
