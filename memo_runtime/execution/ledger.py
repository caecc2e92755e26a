"""Counting the bytes that the runtime itself holds on the device, and their peak.

What is held goes when the object that it belongs to goes, in the middle of a backward pass of PyTorch's engine. No
Python code runs then: an interrupt that arrived meanwhile would be raised in it, and an exception in a destructor is
printed and lost, and with it the Ctrl-C. So a death is only noted, by a function of C, and counted by whoever asks or
holds next.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque


class Share:
    """Bytes on account of one owner, who alone refers to this share; what is left of them goes with it."""

    __slots__ = ("__weakref__", "_ledger", "_left")

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._left = ledger._open(self)

    @property
    def count(self) -> int:
        """Bytes held."""
        return self._left.count

    def hold(self, count: int) -> None:
        """``count`` more bytes are held; fewer if it is negative."""
        self._ledger._hold(self._left, count)

    def clear(self) -> None:
        """Nothing is held any more."""
        self.hold(-self.count)


class _Left(weakref.ref[Share]):
    """What is left of a share, told when it dies."""

    __slots__ = ("count",)
    count: int


class Ledger:
    """Current and peak bytes of all shares. Threads may hold and drop at once, hence the lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current = 0
        self._peak = 0
        #: By identity: a weak reference is hashed as what it refers to.
        self._shares: dict[int, _Left] = {}
        self._ended: deque[weakref.ref[Share]] = deque()

    @property
    def current(self) -> int:
        """Bytes held now."""
        with self._lock:
            return self._exact()

    @property
    def peak(self) -> int:
        """Most bytes held at a time."""
        return self._peak

    def reset_peak(self) -> None:
        """Start a new peak at what is held now."""
        with self._lock:
            self._peak = self._exact()

    def _open(self, share: Share) -> _Left:
        left = _Left(share, self._ended.append)
        left.count = 0
        self._shares[id(left)] = left
        return left

    def _hold(self, left: _Left, count: int) -> None:
        with self._lock:
            self._settle()
            left.count += count
            self._current += count
            self._peak = max(self._peak, self._current)

    def _settle(self) -> None:
        """Count what has gone since the last time."""
        while self._ended:
            # In this order: what an interrupt cuts off is done the next time.
            left = self._shares.get(id(self._ended[0]))
            if left is not None:
                self._current -= left.count
                left.count = 0
                del self._shares[id(left)]
            self._ended.popleft()

    def _exact(self) -> int:
        """The sum of what is there: an interrupt may have come between a share's count and that of all."""
        self._settle()
        self._current = sum(left.count for left in self._shares.values())
        return self._current
