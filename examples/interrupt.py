"""Ctrl-C during training: stop between two instructions, and still say what was done."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Interrupt:
    """Ctrl-C as ``KeyboardInterrupt``, remembered in case somebody on the way swallows the exception."""

    def __init__(self) -> None:
        self._seen = False
        self._before = signal.getsignal(signal.SIGINT)

    def __enter__(self) -> Interrupt:
        # Where the caller has switched the signal off (a shell's background job), it stays off.
        if self._before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._seen = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise ``KeyboardInterrupt`` if there was one."""
        if self._seen:
            raise KeyboardInterrupt

    def ignore(self) -> None:
        """From now on nothing interrupts: all that is left is to say what was done."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
