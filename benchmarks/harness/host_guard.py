"""Ends a contender's process before the machine has no memory left. Needs no torch.

Pinned memory is no process's own: where it takes the last of a machine's, the kernel ends whoever it finds, or nobody
can go on. What counts is what is in use on the whole machine, since one whose memory grows as it is used says only
little of what is free. It also tells who was killed for want of memory from who was killed by somebody.
"""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import psutil

from benchmarks.harness.rows import Row

#: Seconds between two looks; memory is pinned at a few GiB a second.
_INTERVAL = 0.05
#: The same where nothing is to be ended.
_SELDOM = 1.0
#: Share of a machine's memory that is plenty: programs that end others early begin at about 10 %.
_PLENTY = 0.15
#: Where Linux counts the processes that it has ended for want of memory, the machine's or a container's.
_COUNTS = Path("/proc/vmstat")


def _kernel_kills() -> int | None:
    """How many processes the kernel has ended for want of memory; None: it does not say."""
    try:
        lines = _COUNTS.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


class HostGuard:
    """Watches while ``process`` runs, and ends it where more than ``limit`` bytes are in use; None: ends nothing."""

    def __init__(self, process: subprocess.Popen[str], limit: int | None) -> None:
        self.in_use: int | None = None
        self.limit = limit
        self._process = process
        self._kills = _kernel_kills()
        self._least = 1.0
        self._done = threading.Event()
        self._look()
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._done.set()

    def failure(self) -> Row | None:
        """The row of a process that it ended."""
        if self.in_use is None or self.limit is None:
            return None
        said = f"{self.in_use / 2**30:.1f} GiB of host memory were in use, and --host-memory leaves "
        return {"status": "oom", "error": f"ended: {said}{self.limit / 2**30:.1f} GiB"}

    def saw_plenty(self) -> bool:
        """Whether the machine always had memory to spare, and the kernel has ended nobody for want of it."""
        return self._least > _PLENTY and self._kills is not None and _kernel_kills() == self._kills

    def _look(self) -> bool:
        """Whether to look again."""
        memory = psutil.virtual_memory()
        self._least = min(self._least, memory.available / memory.total)
        if self.limit is None or memory.total - memory.available <= self.limit:
            return True
        self.in_use = memory.total - memory.available
        self._process.kill()
        return False

    def _watch(self) -> None:
        while not self._done.wait(_SELDOM if self.limit is None else _INTERVAL):
            if not self._look():
                return
