"""What the machine has: device memory, and host memory as the cgroup or the machine limits it."""

from __future__ import annotations

import gc
import os

import psutil
import torch

from memo_runtime.native.limits import cgroup_limit

#: Left to the rest of the process and the system when nobody named a host budget.
_HOST_RESERVE = 2 * 1024**3


def host_limit() -> tuple[int, str]:
    """(bytes of host memory that a plan may use, which limit that is).

    The smaller of what the cgroup and the machine have left, less a reserve for the process itself.
    """
    available = int(psutil.virtual_memory().available)
    cgroup = cgroup_limit()
    free, source = available, "machine"
    if cgroup is not None and cgroup.free <= available:
        free, source = cgroup.free, cgroup.source
    return max(0, free - min(_HOST_RESERVE, free // 4)), source


def device_memory(device: torch.device) -> tuple[str, int]:
    """(name, bytes that this process may have) of ``device``; a CPU has no device memory of its own: 0."""
    if device.type != "cuda":
        return "cpu", 0
    return torch.cuda.get_device_name(device), _allowed_bytes(device)


def _allowed_bytes(device: torch.device) -> int:
    """All memory of the device, or the part that the user has set by ``set_per_process_memory_fraction``."""
    total = torch.cuda.get_device_properties(device).total_memory
    # It takes no device without an index.
    return int(total * min(1.0, torch.cuda.get_per_process_memory_fraction(device.index)))


def settle_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """Let matrix products, forward and backward, take their workspaces: they stay, and belong to no block.

    They are never moved. Where a large segment is cached one takes the front of it, which is then never given back, so
    what is cached goes first.
    """
    if device.type == "cuda" and dtype.is_floating_point:
        torch.cuda.empty_cache()
        with torch.enable_grad():
            weight = torch.zeros(64, 64, dtype=dtype, device=device, requires_grad=True)
            # From a thread of autograd's own, which has other handles, and so other workspaces.
            torch.autograd.grad((weight @ weight).sum(), weight)
        torch.cuda.synchronize(device)


def allocated_after(device: torch.device) -> int:
    """Bytes that are allocated once the profile's own are free, which are given back to the device; 0 on CPU.

    What is cached is of the profile's shapes, and would splinter the memory of the steps that follow. The peak that is
    counted from here on is the steps'.
    """
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.memory_allocated(device))


def joins_free_memory(device: torch.device) -> bool:
    """Whether PyTorch's allocator uses expandable segments on ``device``."""
    settings = ",".join(os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return device.type == "cuda" and "expandable_segments:true" in settings.lower().replace(" ", "")


def usable_device_bytes(device: torch.device) -> int:
    """Bytes that this process may have allocated at once: what it has, plus what is free; 0 on CPU.

    A twentieth is left to fragmentation and to what libraries allocate outside PyTorch's allocator.
    """
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return min(int((free + torch.cuda.memory_reserved(device)) * 0.95), _allowed_bytes(device))
