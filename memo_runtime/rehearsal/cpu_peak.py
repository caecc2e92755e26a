"""Most bytes of tensors on the CPU while something runs: no allocator counts there, so PyTorch's profiler does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of ``tensors``, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def cpu_peak(run: Callable[[], Any], resident: int) -> int:
    """Peak bytes of tensors while ``run`` runs, which starts with ``resident`` bytes of them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    kineto = profiler.profiler.kineto_results
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return resident + peak
