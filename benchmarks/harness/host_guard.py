"""Ends a contender's process before the machine has no memory left. Needs no torch.

Pinned memory is no process's own: where it takes the last of a machine's, the kernel ends whoever it finds, or nobody
can go on. What counts is what is in use on the whole machine, since one whose memory grows as it is used says only
little of what is free.
"""

from __future__ import annotations

import subprocess
import threading

import psutil

from benchmarks.harness.rows import Row

#: Seconds between two looks; memory is pinned at a few GiB a second.
_INTERVAL = 0.05


class HostGuard:
    """Watches while ``process`` runs, and ends it where more than ``limit`` bytes are in use."""

    def __init__(self, process: subprocess.Popen[str], limit: int) -> None:
        self.in_use: int | None = None
        self.limit = limit
        self._process = process
        self._done = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._done.set()

    def failure(self) -> Row | None:
        """The row of a process that it ended."""
        if self.in_use is None:
            return None
        said = f"{self.in_use / 2**30:.1f} GiB of host memory were in use, and --host-memory leaves "
        return {"status": "oom", "error": f"ended: {said}{self.limit / 2**30:.1f} GiB"}

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL):
            memory = psutil.virtual_memory()
            if memory.total - memory.available > self.limit:
                self.in_use = memory.total - memory.available
                self._process.kill()
                return
