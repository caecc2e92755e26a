"""Peaks of memory: what the caching allocator counted on CUDA; on the CPU, what the profiler saw in a step.

The CPU has no counter of tensors, so one more step runs under PyTorch's profiler, untimed, and its allocations are
added up. That is real but slow, and meant for small shapes.
"""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import torch

#: Elements of which PyTorch gives a thread at least so many.
_WORK_OF_A_THREAD = 32768
_POOL = ("allocated_bytes.current", "reserved_bytes.current")


def limit_memory(size_bytes: int, device: torch.device) -> None:
    """Let this process allocate at most ``size_bytes``: more is an out-of-memory error.

    On the CPU this bounds the process's data beyond what it holds now and the stacks of PyTorch's threads, without
    which it cannot compute at all: one that does not start ends the process.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        # It takes no device without an index.
        torch.cuda.set_per_process_memory_fraction(min(1.0, size_bytes / total), device.index)
        return
    import resource

    _start_threads()
    facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    limit = int(facts["VmData"].split()[0]) * 1024 + size_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _start_threads() -> None:
    """PyTorch starts its threads at the first work that is large enough for all of them."""
    torch.ones(_WORK_OF_A_THREAD * 2 * torch.get_num_threads()).add_(1)


def host_facts(device: torch.device) -> dict[str, int | None]:
    """Resident bytes of this process, and bytes that PyTorch's own pool has pinned; None: it does not say."""
    pinned: int | None = 0
    if device.type == "cuda":
        stats = torch.cuda.host_memory_stats()
        # Older versions call what the pool holds "reserved" and what is handed out "allocated".
        pinned = max((int(stats[name]) for name in _POOL if name in stats), default=None)
    return {"host_rss": psutil.Process().memory_info().rss, "pinned_bytes": pinned}


def release(device: torch.device) -> None:
    """Give unused memory back, so that the next length starts with none reserved, nor pinned by PyTorch's pool."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()


def reset_peaks(device: torch.device) -> None:
    """Start new peaks at what is allocated now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def cuda_peaks(device: torch.device) -> dict[str, int]:
    """Peaks since ``reset_peaks``; nothing on the CPU."""
    if device.type != "cuda":
        return {}
    return {
        "peak_allocated": torch.cuda.max_memory_allocated(device),
        "peak_reserved": torch.cuda.max_memory_reserved(device),
    }
