"""Addresses of a device that has all the room one asks for: known ones, else made up as the CUDA driver was seen to.

    chunk of 160 MiB   | 130 MiB                              | 20 MiB | 10 free |    <- a request below 32 MiB goes
    chunk of 32 MiB    | 16 MiB | 16 MiB |                                               where a chunk has room left
    ...                new chunks go below the others: addresses fall

That is an assumption, read off the addresses of recorded steps on an H100 (driver 580): where nothing is given back in
between it makes all their decisions right (tests/simulation/test_recorded_traces.py). After that it does not know what
the driver itself and other libraries hold.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

#: Address space is handed out in multiples of this.
_CHUNK = 32 * 1024**2
#: Where made-up addresses end: above all that a device has, and divisible by every piece that is mapped at once.
_TOP = 5 << 60


@dataclass(slots=True)
class _Chunk:
    start: int
    end: int
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def room(self, size: int) -> int | None:
        """The lowest address at which ``size`` bytes are free."""
        start = self.start
        for low, high in self.ranges:
            if start + size <= low:
                break
            start = high
        return start if start + size <= self.end else None


class DeviceMemory:
    """Ranges that are held.

    ``known``: (address, bytes) of what a real device gave, in the order in which it was asked. They are given as
    long as just these sizes are asked for. From the first other one on addresses are made up, above all of them.
    """

    def __init__(self, known: Iterable[tuple[int, int]] = ()) -> None:
        self._known = deque(known)
        self._given: set[tuple[int, int]] = set()
        self._chunks: list[_Chunk] = []
        self._num_made_up = 0

    @property
    def num_ranges(self) -> int:
        """How many."""
        return len(self._given) + self._num_made_up

    def allocate(self, size: int) -> int:
        """The start of a new range."""
        if self._known:
            start, expected = self._known.popleft()
            if size == expected:
                self._given.add((start, size))
                return start
            self._known.clear()
        self._num_made_up += 1
        chunk, start = (self._room(size) if size < _CHUNK else None) or self._new_chunk(size)
        insort(chunk.ranges, (start, start + size))
        return start

    def free(self, start: int, size: int) -> None:
        """The range is not held any more."""
        if (start, size) in self._given:
            self._given.remove((start, size))
            return
        self._num_made_up -= 1
        at = bisect_left(self._chunks, start + 1, key=lambda chunk: chunk.start) - 1
        chunk = self._chunks[at]
        chunk.ranges.remove((start, start + size))
        if not chunk.ranges:
            del self._chunks[at]

    def _room(self, size: int) -> tuple[_Chunk, int] | None:
        """Room that is left in a chunk, in the lowest one."""
        for chunk in self._chunks:
            start = chunk.room(size)
            if start is not None:
                return chunk, start
        return None

    def _new_chunk(self, size: int) -> tuple[_Chunk, int]:
        """A chunk of its own, in the highest gap between the others or below them."""
        whole, end = -(-size // _CHUNK) * _CHUNK, _TOP
        for other in reversed(self._chunks):
            if end - other.end >= whole:
                break
            end = other.start
        chunk = _Chunk(end - whole, end)
        insort(self._chunks, chunk, key=lambda other: other.start)
        return chunk, chunk.start
