"""Addresses of a device that has all the room one asks for: the lowest gap that is large enough."""

from __future__ import annotations

from bisect import insort

#: Segments begin at multiples of the largest piece that is mapped at once, and of 2 MiB.
_ALIGNMENT = 20 * 1024**2


class DeviceMemory:
    """Ranges that are held."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    @property
    def num_ranges(self) -> int:
        """How many."""
        return len(self._ranges)

    def allocate(self, size: int) -> int:
        """The start of a new range."""
        start = 0
        for low, high in self._ranges:
            if start + size <= low:
                break
            start = -(-high // _ALIGNMENT) * _ALIGNMENT
        insort(self._ranges, (start, start + size))
        return start

    def free(self, start: int, size: int) -> None:
        """The range is not held any more."""
        self._ranges.remove((start, start + size))
