"""How much more host memory this process may take before the system ends it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_UNIFIED = Path("/sys/fs/cgroup")
#: (root of the hierarchy, file with the limit, file with the use, how messages call it)
_VERSIONS = (
    (_UNIFIED, "memory.max", "memory.current", "cgroup v2 memory.max"),
    (_UNIFIED / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "cgroup v1 memory.limit_in_bytes"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """``free`` bytes of ``total`` are left; ``source`` is which limit that is."""

    free: int
    total: int
    source: str


def cgroup_limit() -> Limit | None:
    """The memory cgroup around this process with the least left; None where none has a limit."""
    found = []
    for root, limit_name, used_name, label in _VERSIONS:
        group = _own_group(root)
        for folder in (group, *group.parents):
            limit = _number(folder / limit_name)
            # Version 1 writes "no limit" as a number near 2^63.
            if limit is not None and limit < 2**60:
                used = _number(folder / used_name) or 0
                found.append(Limit(free=max(0, limit - used), total=limit, source=label))
            if folder == root:
                break
    return min(found, key=lambda one: one.free, default=None)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _own_group(root: Path) -> Path:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return root
    unified = root == _UNIFIED
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if (unified and controllers == "") or (not unified and "memory" in controllers.split(",")):
            return root / path.lstrip("/")
    return root
