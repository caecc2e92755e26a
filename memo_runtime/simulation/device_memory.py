"""Addresses of a device that has all the room one asks for: known ones, then the lowest gap that is large enough."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable

#: Segments begin at multiples of the largest piece that is mapped at once, and of 2 MiB.
_ALIGNMENT = 20 * 1024**2


class DeviceMemory:
    """Ranges that are held.

    ``known``: (address, bytes) of what a real device gave, in the order in which it was asked. They are given as
    long as just these sizes are asked for. From the first other one on addresses are made up, above all of them.
    """

    def __init__(self, known: Iterable[tuple[int, int]] = ()) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._known = deque(known)
        self._bottom = 0

    @property
    def num_ranges(self) -> int:
        """How many."""
        return len(self._ranges)

    def allocate(self, size: int) -> int:
        """The start of a new range."""
        if self._known:
            start, expected = self._known.popleft()
            if size == expected:
                insort(self._ranges, (start, start + size))
                return start
            self._known.clear()
            self._bottom = _above(max(high for _, high in [*self._ranges, (start, start + expected)]))
        start = self._bottom
        for low, high in self._ranges:
            if start + size <= low:
                break
            start = max(start, _above(high))
        insort(self._ranges, (start, start + size))
        return start

    def free(self, start: int, size: int) -> None:
        """The range is not held any more."""
        self._ranges.remove((start, start + size))


def _above(address: int) -> int:
    return -(-address // _ALIGNMENT) * _ALIGNMENT
