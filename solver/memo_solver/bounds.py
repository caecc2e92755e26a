"""Lower bounds of a section, and which heights a peak can have at all.

- Load: at each moment the sizes alive add up; no placement is lower.
- Aligned load: when every alignment is a multiple of g > 1, each request but
  the topmost occupies its size rounded up to g, so
  sum(roundup(size, g)) - max(roundup(size, g) - size) bounds the peak.
- Reachable heights (all alignments 1): a packing can be pushed down until every
  request rests on the floor or on another one, so some optimal peak is a sum of
  distinct requests' sizes. Once a height is proved impossible, the next bound
  is the next such sum, not the next integer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from memo_solver.records import Problem, Proof
from memo_solver.sections import Section

ALIVE_TOGETHER = "these requests are alive together"


def rounded_up(multiple: int) -> str:
    """Reason of a bound that counts more than the bytes: all alignments are multiples of `multiple`."""
    return f"{ALIVE_TOGETHER}, and each but the topmost takes a multiple of {multiple}"


MAX_SUM_BITS = 2_000_000_000
"""Work allowed for the table of sums, in bit operations (about a tenth of a second)."""


def peak_load(problem: Problem) -> Proof:
    """Largest sum of sizes alive at one time, with the time and the requests (one quick sweep)."""
    # Ends come before starts at equal times, as a negative change sorts first.
    changes = [(r.lower, r.size) for r in problem.requests if not r.is_empty]
    changes += [(r.upper, -r.size) for r in problem.requests if not r.is_empty]
    changes.sort()
    best, best_time, load = 0, 0, 0
    for time, change in changes:
        load += change
        if load > best:
            best, best_time = load, time
    alive = tuple(r.id for r in problem.requests if r.lower <= best_time < r.upper and r.size > 0)
    return Proof(bound=best, reason=ALIVE_TOGETHER, time=best_time, request_ids=alive)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBound:
    """Lower bound of the peak (in units) and the slot whose live set proves it."""

    bound: int
    slot: int


def load_bound(section: Section) -> LoadBound:
    """Largest aligned load over all slots."""
    unit = math.gcd(*section.alignment)
    rounded = [-(-size // unit) * unit for size in section.size]
    change = [0] * (section.num_slots + 1)
    starts: list[list[int]] = [[] for _ in range(section.num_slots)]
    for i, (first, last) in enumerate(zip(section.first, section.last, strict=True)):
        change[first] += rounded[i]
        change[last + 1] -= rounded[i]
        starts[first].append(i)
    best = LoadBound(bound=0, slot=0)
    total = 0
    for slot in range(section.num_slots):
        total += change[slot]
        if total > best.bound:
            # The topmost request need not be rounded up; assume the most favourable one is on top.
            spare = 0
            if unit > 1:
                spare = max(rounded[i] - section.size[i] for i in section.members(slot))
            if total - spare > best.bound:
                best = LoadBound(bound=total - spare, slot=slot)
    return best


class ReachableHeights:
    """Sums of distinct sizes up to a limit, or nothing known when that is too much work."""

    def __init__(self, section: Section, limit: int) -> None:
        self._limit = limit
        self._sums: int | None = None
        if any(a > 1 for a in section.alignment) or limit * section.num_requests > MAX_SUM_BITS:
            return
        mask = (1 << (limit + 1)) - 1
        sums = 1
        for size in section.size:
            sums |= (sums << size) & mask
        self._sums = sums

    def at_most(self, height: int) -> int:
        """Largest height a peak can have that is not above `height`."""
        if self._sums is None or not 0 <= height <= self._limit:
            return height
        return (self._sums & ((1 << (height + 1)) - 1)).bit_length() - 1

    def above(self, height: int) -> int:
        """Smallest height a peak can have that is above `height`."""
        if self._sums is None or not 0 <= height < self._limit:
            return height + 1
        rest = self._sums >> (height + 1)
        if rest == 0:
            return height + 1
        return height + 1 + (rest & -rest).bit_length() - 1


def contention(section: Section) -> list[int]:
    """Highest load met during the lifetime of each request, in units (sparse table)."""
    levels = [section.loads()]
    width = 1
    while 2 * width <= section.num_slots:
        below = levels[-1]
        levels.append(list(map(max, below[:-width], below[width:])))
        width *= 2
    result = []
    for first, last in zip(section.first, section.last, strict=True):
        level = (last - first + 1).bit_length() - 1
        row = levels[level]
        result.append(max(row[first], row[last + 1 - (1 << level)]))
    return result
