"""First fit and its repair in plain Python: the fallback without the compiled search.

The same algorithms as csrc/solver/interval_index.hpp and squeaky_wheel.cpp, with
the same random numbers, so that both give the same placement (tested).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence

from memo_solver.outcome import Outcome, SearchResult, StopFlag
from memo_solver.sections import Section

_MASK = 2**64 - 1
STALE_PASSES = 12
"""Passes without gain after which the repair restarts from the best order."""


class SplitMix:
    """SplitMix64 (Steele, Lea, Flood 2014): the same numbers as the compiled search."""

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK

    def below(self, bound: int) -> int:
        """Next number, uniform in [0, bound)."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((z ^ (z >> 31)) * bound) >> 64


class SpanSet:
    """Sorted, disjoint, merged address ranges."""

    __slots__ = ("begins", "ends")

    def __init__(self) -> None:
        self.begins: list[int] = []
        self.ends: list[int] = []

    def add(self, begin: int, end: int) -> None:
        """Take the addresses [begin, end)."""
        at = bisect_left(self.ends, begin)
        stop = at
        while stop < len(self.begins) and self.begins[stop] <= end:
            stop += 1
        if stop > at:
            begin = min(begin, self.begins[at])
            end = max(end, self.ends[stop - 1])
        self.begins[at:stop] = [begin]
        self.ends[at:stop] = [end]

    def clear_of(self, at: int, size: int) -> int:
        """Return `at` when [at, at + size) is free, else the end of the first range in the way."""
        k = bisect_left(self.ends, at + 1)
        if k < len(self.begins) and self.begins[k] < at + size:
            return self.ends[k]
        return at


class IntervalIndex:
    """Addresses taken during a range of slots, without a list of conflicts.

    A segment tree over slots: `below` holds what touches a node's range, `whole`
    what covers all of it (see csrc/solver/interval_index.hpp).
    """

    def __init__(self, num_slots: int) -> None:
        self._leaves = 1
        while self._leaves < num_slots:
            self._leaves *= 2
        self._below = [SpanSet() for _ in range(2 * self._leaves)]
        self._whole = [SpanSet() for _ in range(2 * self._leaves)]

    def add(self, first: int, last: int, begin: int, end: int) -> None:
        """Take [begin, end) during slots first..last."""
        for node in self._parts(first, last):
            self._whole[node].add(begin, end)
            self._below[node].add(begin, end)
        for node in self._ancestors(first, last):
            self._below[node].add(begin, end)

    def first_free(self, first: int, last: int, size: int, alignment: int) -> int:
        """Lowest aligned offset that is free for `size` during slots first..last."""
        sets = [self._below[node] for node in self._parts(first, last)]
        sets += [self._whole[node] for node in self._ancestors(first, last)]
        sets = [spans for spans in sets if spans.begins]
        at, quiet, k = 0, 0, 0
        while quiet < len(sets):
            moved = sets[k].clear_of(at, size)
            if moved == at:
                quiet += 1
                k = (k + 1) % len(sets)
            else:
                at = -(-moved // alignment) * alignment
                quiet = 0
        return at

    def _parts(self, first: int, last: int) -> list[int]:
        left, right = first + self._leaves, last + self._leaves + 1
        nodes = []
        while left < right:
            if left & 1:
                nodes.append(left)
                left += 1
            if right & 1:
                right -= 1
                nodes.append(right)
            left >>= 1
            right >>= 1
        return nodes

    def _ancestors(self, first: int, last: int) -> list[int]:
        nodes = set()
        for leaf in (first + self._leaves, last + self._leaves):
            while leaf >= 1 and leaf not in nodes:
                nodes.add(leaf)
                leaf >>= 1
        return sorted(nodes)


def first_fit(
    section: Section, order: Sequence[int], *, stop: StopFlag, deadline: float
) -> list[int] | None:
    """Place every request at its lowest free offset, in `order`; None when stopped."""
    index = IntervalIndex(section.num_slots)
    offsets = [0] * section.num_requests
    for count, i in enumerate(order):
        if count % 64 == 63 and (stop.is_set() or time.monotonic() >= deadline):
            return None
        first, last, size = section.first[i], section.last[i], section.size[i]
        offsets[i] = index.first_free(first, last, size, section.alignment[i])
        index.add(first, last, offsets[i], offsets[i] + size)
    return offsets


def squeaky_wheel(
    section: Section,
    order: Sequence[int],
    *,
    num_fixed: int = 0,
    target: int,
    max_passes: int,
    seed: int,
    stop: StopFlag,
    seconds: float,
) -> SearchResult:
    """Repeat first fit, moving requests that end above `target` forward at random.

    The first `num_fixed` requests of the order stay where they are.
    """
    deadline = time.monotonic() + seconds
    random = SplitMix(seed)
    current = list(order)
    best: tuple[int, list[int], list[int]] | None = None
    num_passes = stale = 0
    while num_passes < max_passes:
        # A pass over few requests does not look at the clock, so each but the first does before it begins.
        if num_passes > 0 and (stop.is_set() or time.monotonic() >= deadline):
            break
        offsets = first_fit(section, current, stop=stop, deadline=deadline)
        if offsets is None:
            break
        num_passes += 1
        stale += 1
        peak = max(offset + size for offset, size in zip(offsets, section.size, strict=True))
        if best is None or peak < best[0]:
            best = (peak, offsets, list(current))
            stale = 0
        if best[0] <= target:
            break
        if stale >= STALE_PASSES:
            _, offsets, current = best[0], best[1], list(best[2])
            stale = 0
        current = _promote(
            section, current, num_fixed=num_fixed, offsets=offsets, target=target, random=random
        )
    if best is None:
        return SearchResult(outcome=Outcome.STOPPED, effort=num_passes)
    return SearchResult(outcome=Outcome.FOUND, offsets=tuple(best[1]), effort=num_passes)


def _promote(
    section: Section,
    order: list[int],
    *,
    num_fixed: int,
    offsets: Sequence[int],
    target: int,
    random: SplitMix,
) -> list[int]:
    keyed: list[tuple[int, int, int]] = []
    for position, i in enumerate(order):
        key = 2 * position
        if position >= num_fixed and offsets[i] + section.size[i] > target:
            key = 2 * (num_fixed + random.below(position - num_fixed + 1)) - 1
        keyed.append((key, position, i))
    keyed.sort()
    return [i for _, _, i in keyed]
