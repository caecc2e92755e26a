"""Reductions: from a problem to independent sections in slots and units.

1. Requests that occupy nothing get offset 0 and leave.
2. Time becomes slots, one per maximal live set (a clique that another one
   contains is dropped). Two requests conflict exactly when their slot ranges
   meet, so naming, time scaling and row order are gone from here on.
3. Where nothing is alive the problem falls into independent sections.
4. Sizes and alignments are divided by their greatest common divisor: the unit.
5. Interchangeable requests (same slots, size, alignment) become neighbours in
   the order of a section, which is how the searches recognise them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from memo_solver.records import Problem

MAX_NATIVE_TOTAL = 2**62
"""Sum of sizes and alignments of a section up to which 64-bit arithmetic cannot overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Requests that are tied together in time; all lists are parallel, sizes in units."""

    index: tuple[int, ...]
    """Position of each request in the problem."""
    first: tuple[int, ...]
    """First slot of each request."""
    last: tuple[int, ...]
    """Last slot of each request, inclusive."""
    size: tuple[int, ...]
    alignment: tuple[int, ...]
    num_slots: int
    unit: int
    """Bytes per unit of size, alignment and offset."""

    @property
    def num_requests(self) -> int:
        """Number of requests."""
        return len(self.index)

    @property
    def fits_native(self) -> bool:
        """Whether no sum in the native searches can overflow 64 bits."""
        return sum(self.size) + sum(self.alignment) < MAX_NATIVE_TOTAL

    def loads(self) -> list[int]:
        """Sum of sizes alive in each slot, in units."""
        change = [0] * (self.num_slots + 1)
        for first, last, size in zip(self.first, self.last, self.size, strict=True):
            change[first] += size
            change[last + 1] -= size
        total = 0
        loads = []
        for delta in change[:-1]:
            total += delta
            loads.append(total)
        return loads

    def members(self, slot: int) -> list[int]:
        """Requests (positions in the section) alive in a slot."""
        pairs = enumerate(zip(self.first, self.last, strict=True))
        return [i for i, (first, last) in pairs if first <= slot <= last]


def split(problem: Problem) -> list[Section]:
    """Cut a problem into its sections, in order of time."""
    requests = problem.requests
    occupied = [i for i, r in enumerate(requests) if not r.is_empty]
    # Ends (0) before starts (1) at equal times: lifetimes are half-open.
    events = [(requests[i].lower, 1, i) for i in occupied]
    events += [(requests[i].upper, 0, i) for i in occupied]
    events.sort()
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    sections: list[Section] = []
    members: list[int] = []
    slot, num_alive, grew = 0, 0, False
    for _, is_start, i in events:
        if is_start:
            first[i] = slot
            members.append(i)
            num_alive += 1
            grew = True
            continue
        if grew:
            # The first end after a start closes a maximal live set.
            slot += 1
            grew = False
        last[i] = slot - 1
        num_alive -= 1
        if num_alive == 0:
            sections.append(_section(problem, members, first, last, slot))
            members, slot = [], 0
    return sections


def _section(
    problem: Problem, members: list[int], first: dict[int, int], last: dict[int, int], num_slots: int
) -> Section:
    requests = problem.requests

    def order(i: int) -> tuple[int, int, int, int, int, int, str]:
        r = requests[i]
        return (first[i], last[i], r.size, r.alignment, r.lower, r.upper, r.id)

    members = sorted(members, key=order)
    unit = math.gcd(*(requests[i].size for i in members))
    if any(requests[i].alignment > 1 for i in members):
        unit = _aligned_unit([requests[i].size for i in members], [requests[i].alignment for i in members])
    return Section(
        index=tuple(members),
        first=tuple(first[i] for i in members),
        last=tuple(last[i] for i in members),
        size=tuple(requests[i].size // unit for i in members),
        alignment=tuple(_in_units(requests[i].alignment, unit) for i in members),
        num_slots=num_slots,
        unit=unit,
    )


def _aligned_unit(sizes: list[int], alignments: list[int]) -> int:
    """Unit for aligned requests.

    Every offset in a pushed-down packing is a sum of sizes rounded up to
    alignments. An alignment that divides the gcd of all sizes is always met.
    """
    unit = math.gcd(*sizes)
    while True:
        needed = [a for a in alignments if unit % a != 0]
        smaller = math.gcd(unit, *needed)
        if smaller == unit:
            return unit
        unit = smaller


def _in_units(alignment: int, unit: int) -> int:
    """Alignment in units: 1 when every multiple of the unit is aligned."""
    return 1 if unit % alignment == 0 else alignment // unit
