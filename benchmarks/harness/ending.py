"""How a contender's process ended, where that was not as it should: its last words and their cause. Needs no torch."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections import deque

from benchmarks.harness.rows import Row
from memo_runtime.rehearsal.threads import limits_memory, starts_a_thread

_KEPT_LINES = 20
_MESSAGE_LIMIT = 600
#: What a process says that ends for want of memory: the CPU's allocator, C++ and Python.
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc", "memoryerror")
#: What libgomp and C++ say where a thread does not start.
_NO_THREAD = ("thread creation failed", "resource temporarily unavailable")


class LastWords:
    """Passes on what a process says to this one's talk, and keeps the end of it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._process = process
        self._thread = threading.Thread(target=self._relay, daemon=True)
        self._thread.start()

    def _relay(self) -> None:
        assert self._process.stderr is not None, "it is a pipe"
        with self._process.stderr as talk:
            for line in talk:
                sys.stderr.write(line)
                sys.stderr.flush()
                if line.strip():
                    self.lines.append(line.strip())

    def wait(self, seconds: float) -> tuple[str, ...]:
        """Them, when all was said, or after so long: what it started may keep the pipe."""
        self._thread.join(seconds)
        return tuple(self.lines)


def failure(returned: int, said: tuple[str, ...], *, capped: bool, plenty: bool = False) -> Row:
    """The row of a process that ``returned`` that and ``said`` this at last.

    Args:
        capped: its memory was limited beyond what limits this process.
        plenty: host memory was not short meanwhile.
    """
    if returned == -signal.SIGKILL and plenty:
        return {"status": "error", "error": "killed by signal 9 from outside: host memory was not short"}
    if returned == -signal.SIGKILL:
        # Nobody else kills without asking: the kernel, or a container's memory limit.
        return {"status": "oom", "error": "killed by signal 9, as processes are when host memory runs out"}
    ended = f"signal {-returned}" if returned < 0 else f"exit code {returned}"
    text = "\n".join(said).lower()
    status = "error"
    if any(mark in text for mark in _NO_MEMORY):
        status, cause = "oom", "for want of memory"
    elif any(mark in text for mark in _NO_THREAD) and (capped or limits_memory()) and starts_a_thread():
        # Its memory was limited and threads are still to be had.
        status, cause = "oom", "for want of memory for the stack of a thread"
    else:
        cause = "of its own"
    words = f"; it said: {said[-1]}" if said else ""
    return {"status": status, "error": f"the process ended with {ended}, {cause}{words}"[:_MESSAGE_LIMIT]}
