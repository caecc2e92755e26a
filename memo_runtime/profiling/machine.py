"""What the machine has: device memory, and host memory as the cgroup or the machine limits it."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUP_V2 = Path("/sys/fs/cgroup")
_CGROUP_V1 = Path("/sys/fs/cgroup/memory")
#: Left to the rest of the process and the system when nobody named a host budget.
_HOST_RESERVE = 2 * 1024**3


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_free() -> tuple[int, str] | None:
    """(free bytes, which limit) of the innermost memory cgroup that has a limit."""
    for root, limit_name, used_name, label in (
        (_CGROUP_V2, "memory.max", "memory.current", "cgroup v2 memory.max"),
        (_CGROUP_V1, "memory.limit_in_bytes", "memory.usage_in_bytes", "cgroup v1 memory.limit_in_bytes"),
    ):
        limit = _read_number(_own_group(root) / limit_name) or _read_number(root / limit_name)
        used = _read_number(_own_group(root) / used_name) or _read_number(root / used_name)
        # Version 1 writes "no limit" as a number near 2^63.
        if limit is not None and limit < 2**60:
            return max(0, limit - (used or 0)), label
    return None


def _own_group(root: Path) -> Path:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return root
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if (controllers == "" and root == _CGROUP_V2) or "memory" in controllers.split(","):
            return root / path.lstrip("/")
    return root


def host_limit() -> tuple[int, str]:
    """(bytes of host memory that a plan may use, which limit that is).

    The smaller of what the cgroup and the machine have left, less a reserve for the process itself.
    """
    available = int(psutil.virtual_memory().available)
    cgroup = _cgroup_free()
    free, source = (available, "machine") if cgroup is None or cgroup[0] > available else cgroup
    return max(0, free - min(_HOST_RESERVE, free // 4)), source


def device_memory(device: torch.device) -> tuple[str, int]:
    """(name, bytes of memory) of ``device``; a CPU has no device memory of its own: 0."""
    if device.type != "cuda":
        return "cpu", 0
    return torch.cuda.get_device_name(device), int(torch.cuda.get_device_properties(device).total_memory)


def usable_device_bytes(device: torch.device) -> int:
    """Bytes that this process may have allocated at once: what it has, plus what is free; 0 on CPU.

    A twentieth is left to fragmentation and to what libraries allocate outside PyTorch's allocator.
    """
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return int((free + torch.cuda.memory_reserved(device)) * 0.95)
