"""Measuring the link between device and host memory, through the engine that training copies with."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from memo_runtime.native.backend import choose_backend
from memo_runtime.native.engine import CopyEngine
from memo_runtime.records import Link

_BYTES = {"cuda": 64 * 1024**2, "cpu": 32 * 1024**2}
_REPEATS = 5
#: Copies that are submitted one after the other to time the submission; few enough that no queue fills up.
_SUBMISSIONS = 64
_SMALL_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFacts:
    """What was measured of one device's link.

    Attributes:
        to_host, to_device: bytes per second of one direction alone. both: of both together; None where there is no GPU
            to overlap them. pinning: bytes per second of making pinned memory; None where nothing is pinned.
        submit_seconds: of the host, for one submitted copy. copies: who copies, and why.
    """

    to_host: float
    to_device: float
    both: float | None
    pinning: float | None
    submit_seconds: float
    copies: str


def measure_link(device: torch.device) -> Link:
    """Copy rates of ``device`` in bytes per second; once per process."""
    facts = link_facts(device)
    return Link(to_host=facts.to_host, to_device=facts.to_device)


@functools.lru_cache(maxsize=8)
def link_facts(device: torch.device) -> LinkFacts:
    """Rates of ``device``, medians of five; once per process."""
    backend = choose_backend(device)
    size = _BYTES.get(device.type, _BYTES["cpu"])
    _synchronize(device)
    start = time.perf_counter()
    slab = backend.slab(2 * size)
    seconds = time.perf_counter() - start
    slab.memory.fill_(1)
    engine = backend.engine()
    far = torch.ones(size, dtype=torch.uint8, device=device)
    near, other = slab.memory[:size], slab.memory[size:]
    away = torch.empty_like(far) if device.type == "cuda" else far

    def to_host() -> None:
        engine.to_host(far, near).wait()

    def to_device() -> None:
        engine.to_device(other, away).wait()

    def both() -> None:
        tickets = [engine.to_host(far, near), engine.to_device(other, away)]
        for ticket in tickets:
            ticket.wait()

    facts = LinkFacts(
        to_host=_rate(to_host, size, device),
        to_device=_rate(to_device, size, device),
        both=_rate(both, 2 * size, device) if device.type == "cuda" else None,
        pinning=slab.mapped / max(1e-9, seconds) if slab.pinned else None,
        submit_seconds=_submission(engine, far, near, device),
        copies=backend.description,
    )
    engine.close()
    slab.close()
    return facts


def _rate(copy: Callable[[], None], size_bytes: int, device: torch.device) -> float:
    seconds = []
    for _ in range(_REPEATS + 1):
        _synchronize(device)
        start = time.perf_counter()
        copy()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return size_bytes / max(1e-9, statistics.median(seconds[1:]))


def _submission(engine: CopyEngine, far: torch.Tensor, near: torch.Tensor, device: torch.device) -> float:
    """Host seconds of one submitted copy of a small tensor back to the device."""
    source, target = near[:_SMALL_BYTES], far[:_SMALL_BYTES]
    found = []
    for _ in range(_REPEATS + 1):
        _synchronize(device)
        start = time.perf_counter()
        tickets = [engine.to_device(source, target, name="a copy") for _ in range(_SUBMISSIONS)]
        found.append((time.perf_counter() - start) / _SUBMISSIONS)
        for ticket in tickets:
            ticket.wait()
    return statistics.median(found[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
