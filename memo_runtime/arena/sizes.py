"""How many bytes a request has at other lengths than those at which it was seen.

Most sizes are so many bytes a token. Scratch of kernels often is so many bytes for each begun multiple of a power of
two, such as what PyTorch's reductions keep between thread blocks:

    tokens      1,000    1,500    1,700    2,000           one MiB for each 64 tokens begun
    MiB            16       24       27       32           1,000 and 1,500 say so: no whole bytes a token give both

Where lengths do not tell multiples apart (1,024 and 1,536) the smallest that fits is taken, and bounds say what else is
possible: sizes only grow with the length, so they are between those at the lengths around it.
"""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass

#: Powers of two that lengths are rounded up to.
MULTIPLES = tuple(1 << exponent for exponent in range(11))

#: (tokens, bytes), by tokens.
Points = tuple[tuple[int, int], ...]


def _up(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Growth:
    """The sizes of a request that was seen at ``points``; ``multiple``: what lengths are rounded up to, 0 where no one
    multiple explains all points.
    """

    points: Points
    multiple: int

    def at(self, tokens: int) -> int:
        """The most probable size."""
        if not self.multiple:  # what differs from step to step as well: room for the largest so far
            below = self.points[: bisect.bisect_left(self.points, (tokens, 0))]
            return max(self._between(tokens), *(size for _, size in below), 0)
        (at, size), (end, last) = ((_up(t, self.multiple), s) for t, s in (self.points[0], self.points[-1]))
        return size if last == size else size + -(-(last - size) * (_up(tokens, self.multiple) - at) // (end - at))

    def _between(self, tokens: int) -> int:
        """On the lines from point to point; below them in proportion, above them what is more."""
        above = bisect.bisect_left(self.points, (tokens, 0))
        if above == 0:
            first, size = self.points[0]
            return -(-size * tokens // first)
        at, size = self.points[above - 1]
        if above < len(self.points):
            end, last = self.points[above]
            return size + -(-(last - size) * (tokens - at) // (end - at))
        before, lower = self.points[-2]
        if size <= lower:
            return size
        return max(-(-size * tokens // at), size + -(-(size - lower) * (tokens - at) // (at - before)))

    def bounds(self, tokens: int) -> tuple[int, int | None]:
        """Least and most bytes, where more tokens never need fewer; None: no longer length was seen."""
        above = bisect.bisect_left(self.points, (tokens, 0))
        most = self.points[above][1] if above < len(self.points) else None
        if above < len(self.points) and self.points[above][0] == tokens:
            return self.points[above][1], most
        if above == 0:
            first, size = self.points[0]
            return size * tokens // (first + MULTIPLES[-1] - 1), most  # it may have been rounded up
        return self.points[above - 1][1], most


@functools.lru_cache(maxsize=1 << 16)
def growth_of(points: Points) -> Growth:
    """Of a request with these sizes at two or more lengths, in order of length."""
    if all(size == points[0][1] for _, size in points):
        return Growth(points, 1)
    found = [(rank, multiple) for multiple in MULTIPLES if (rank := _rank(points, multiple)) is not None]
    return Growth(points, min(found)[1] if found else 0)


def _rank(points: Points, multiple: int) -> int | None:
    """How odd it would be if sizes grew with the length rounded up to ``multiple``; None: they do not."""
    rounded = [(_up(tokens, multiple), size) for tokens, size in points]
    (start, size), (end, last) = rounded[0], rounded[-1]
    rise, run = last - size, end - start
    if run == 0 or any((s - size) * run != rise * (at - start) for at, s in rounded):
        return None
    if rise % run:
        return 2
    return 0 if size * run == rise * start else 1
