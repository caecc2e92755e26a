"""Counting the bytes that the runtime itself holds on the device, and their peak."""

from __future__ import annotations

import threading


class Ledger:
    """Current and peak bytes. Freed from whatever thread drops the last reference, hence the lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.current = 0
        self.peak = 0

    def hold(self, count: int) -> None:
        """``count`` more bytes are held."""
        with self._lock:
            self.current += count
            self.peak = max(self.peak, self.current)

    def drop(self, count: int) -> None:
        """``count`` bytes were freed."""
        with self._lock:
            self.current -= count

    def reset_peak(self) -> None:
        """Start a new peak at what is held now."""
        with self._lock:
            self.peak = self.current
