"""What binds a contender's process to its runner: neither outlives the other, and signals are the runner's. No torch.

    python -m benchmarks.harness.bound PID-OF-THE-RUNNER

is a contender's process. On Linux the kernel ends it with its runner, however that one ends: left alone it would go on
for minutes, beside what the next run measures. Ctrl-C reaches both, and the runner decides what it means.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

#: Of <linux/prctl.h>: the signal that a process gets when its parent has ended.
_PR_SET_PDEATHSIG = 1
_OURS = (signal.SIGINT, signal.SIGTERM)


def bind(runner: int) -> bool:
    """End this process when its parent ends; whether that still is ``runner``, which may have ended before."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    return os.getppid() == runner


@contextmanager
def held_back() -> Iterator[None]:
    """What is started inside has no interrupts until it is bound. This process may, where it has other threads."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM is an interrupt, as Ctrl-C is: what was started is ended, and what was measured is printed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # Elsewhere no handler can be set; and who started this may want it ignored.
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main() -> int:
    """Be a contender's process while its runner is there."""
    if not bind(int(sys.argv[1])):
        return 1
    # A handler and not SIG_IGN: what a contender starts has the default.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)
    from benchmarks.harness import worker  # after torch, which takes seconds, it might be too late

    return worker.main()


if __name__ == "__main__":
    sys.exit(main())
