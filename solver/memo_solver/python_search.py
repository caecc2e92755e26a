"""The exact search in plain Python: fallback, and oracle of csrc/solver/canonical_search.cpp.

Every packing can be pushed down and then built bottom-up, so requests are placed
by growing offset, each at its lowest possible one, equal offsets in one fixed
order. A branch is cut when a slot cannot hold what is still to come, or when a
request would leave a gap into which another still fits whole. Unlike the
compiled search it does not split the time axis while searching.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from memo_solver.outcome import Outcome, SearchResult, StopFlag
from memo_solver.sections import Section


class _Stop(Exception):  # noqa: N818 - carries an outcome out of the recursion, not an error
    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class _Search:
    def __init__(
        self,
        section: Section,
        order: Sequence[int],
        *,
        capacity: int,
        max_nodes: int,
        stop: StopFlag,
        deadline: float,
    ) -> None:
        self.section = section
        self.capacity = capacity
        self.order = order
        self.max_nodes = max_nodes
        self.stop = stop
        self.deadline = deadline
        self.num_nodes = 0
        self.floor = [0] * section.num_slots
        self.rest = section.loads()
        self.offsets = [-1] * section.num_requests

    def lowest(self, i: int) -> int:
        """Lowest offset of an unplaced request above everything placed in its slots."""
        floor = max(self.floor[self.section.first[i] : self.section.last[i] + 1])
        alignment = self.section.alignment[i]
        return -(-floor // alignment) * alignment

    def overflows(self, offset: int) -> bool:
        """Whether some slot cannot hold what is left when nothing goes below `offset`."""
        pairs = zip(self.floor, self.rest, strict=True)
        return any(rest and max(floor, offset) + rest > self.capacity for floor, rest in pairs)

    def run(self, num_placed: int, min_offset: int, min_rank: int) -> bool:
        """Place what is left; True when everything fits."""
        if num_placed == self.section.num_requests:
            return True
        self.num_nodes += 1
        if self.num_nodes > self.max_nodes:
            raise _Stop(Outcome.LIMIT)
        if self.num_nodes % 64 == 0 and (self.stop.is_set() or time.monotonic() >= self.deadline):
            raise _Stop(Outcome.STOPPED)
        size = self.section.size
        left = [(self.lowest(i), rank, i) for rank, i in enumerate(self.order) if self.offsets[i] < 0]
        lowest_top = min(offset + size[i] for offset, _, i in left)
        for offset, rank, i in sorted(left):
            if offset >= lowest_top:
                break
            if (offset, rank) >= (min_offset, min_rank) and self._try(i, offset, rank, num_placed):
                return True
        return False

    def _try(self, i: int, offset: int, rank: int, num_placed: int) -> bool:
        first, last, size = self.section.first[i], self.section.last[i], self.section.size[i]
        if offset + size > self.capacity:
            return False
        saved = self.floor[first : last + 1]
        self.floor[first : last + 1] = [offset + size] * (last - first + 1)
        for slot in range(first, last + 1):
            self.rest[slot] -= size
        self.offsets[i] = offset
        if not self.overflows(offset) and self.run(num_placed + 1, offset, rank):
            return True
        self.offsets[i] = -1
        self.floor[first : last + 1] = saved
        for slot in range(first, last + 1):
            self.rest[slot] += size
        return False


MAX_REQUESTS = 600
"""Above this the recursion would come near Python's limit, and the search near eternity."""


def canonical_search(
    section: Section,
    order: Sequence[int],
    *,
    capacity: int,
    max_nodes: int,
    stop: StopFlag,
    seconds: float,
) -> SearchResult:
    """Look for a placement below `capacity` (in units); INFEASIBLE is a proof."""
    if section.num_requests > MAX_REQUESTS:
        return SearchResult(outcome=Outcome.LIMIT)
    deadline = time.monotonic() + seconds
    search = _Search(
        section, order, capacity=capacity, max_nodes=max_nodes, stop=stop, deadline=deadline
    )
    if search.overflows(0):
        return SearchResult(outcome=Outcome.INFEASIBLE)
    try:
        found = search.run(0, 0, -1)
    except _Stop as stopped:
        return SearchResult(outcome=stopped.outcome, effort=search.num_nodes)
    outcome = Outcome.FOUND if found else Outcome.INFEASIBLE
    offsets = tuple(search.offsets) if found else None
    return SearchResult(outcome=outcome, offsets=offsets, effort=search.num_nodes)
