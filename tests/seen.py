"""What hooks of a test see of runs of the profile, which puts back what they leave in lists and dicts."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any


class Seen:
    """Keeps what it is given in a queue of the standard library, which nothing looks into."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Any] = SimpleQueue()

    def add(self, value: Any) -> None:
        """To be called by hooks."""
        self._queue.put(value)

    def taken(self) -> list[Any]:
        """All that came since this was asked last."""
        return [self._queue.get() for _ in range(self._queue.qsize())]
