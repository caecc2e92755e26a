"""Measuring the link between device and host memory."""

from __future__ import annotations

import functools
import statistics
import time

import torch

from memo_runtime.records import Link

_BYTES = {"cuda": 64 * 1024**2, "cpu": 32 * 1024**2}
_REPEATS = 5


@functools.lru_cache(maxsize=8)
def measure_link(device: torch.device) -> Link:
    """Copy rates of ``device`` in bytes per second, median of five copies each way; once per process."""
    size = _BYTES.get(device.type, _BYTES["cpu"])
    host = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    far = torch.empty(size, dtype=torch.uint8, device=device)
    return Link(to_host=_rate(far, host, device), to_device=_rate(host, far, device))


def _rate(source: torch.Tensor, target: torch.Tensor, device: torch.device) -> float:
    seconds = []
    for _ in range(_REPEATS + 1):
        _synchronize(device)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return source.numel() / max(1e-9, statistics.median(seconds[1:]))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
