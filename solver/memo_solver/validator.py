"""Is a placement right? Plain, independent, and run on every result.

It shares no code with the search: no compressed time, no units, no index. A
sweep over the events keeps the address ranges that are alive in one sorted
list; a request that starts must fit between its two neighbours there.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Sequence
from dataclasses import dataclass

from memo_solver.errors import InvalidPlacementError
from memo_solver.records import Problem, Request


class Rule(enum.Enum):
    """The rules of a placement."""

    COUNT = "every request has exactly one offset"
    NEGATIVE = "no offset is below zero"
    ALIGNMENT = "every offset is a multiple of the request's alignment"
    OVERLAP = "requests alive at the same time share no address"
    CAPACITY = "no request ends above the capacity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A broken rule and the requests (one or two) that break it."""

    rule: Rule
    request_ids: tuple[str, ...]
    detail: str


def find_violation(
    problem: Problem, offsets: Sequence[int], *, capacity: int | None = None
) -> Violation | None:
    """Return the first broken rule, or None when the placement is right.

    `capacity` replaces the problem's own when given.
    """
    if len(offsets) != len(problem.requests):
        detail = f"{len(problem.requests)} requests but {len(offsets)} offsets"
        return Violation(rule=Rule.COUNT, request_ids=(), detail=detail)
    limit = problem.capacity if capacity is None else capacity
    for request, offset in zip(problem.requests, offsets, strict=True):
        if offset < 0:
            return _alone(Rule.NEGATIVE, request, offset, "")
        if offset % request.alignment != 0:
            return _alone(Rule.ALIGNMENT, request, offset, f", alignment {request.alignment}")
        if limit is not None and offset + request.size > limit and not request.is_empty:
            end = offset + request.size
            return _alone(Rule.CAPACITY, request, offset, f" ends at {end}, capacity {limit}")
    return _find_overlap(problem, offsets)


def _alone(rule: Rule, request: Request, offset: int, detail: str) -> Violation:
    return Violation(
        rule=rule, request_ids=(request.id,), detail=f"'{request.id}' at offset {offset}{detail}"
    )


def _find_overlap(problem: Problem, offsets: Sequence[int]) -> Violation | None:
    requests = problem.requests
    # At equal times ends (0) come before starts (1): lifetimes are half-open.
    events: list[tuple[int, int, int]] = []
    for i, request in enumerate(requests):
        if request.size > 0 and request.lower < request.upper:
            events.append((request.lower, 1, i))
            events.append((request.upper, 0, i))
    events.sort()
    alive: list[tuple[int, int]] = []  # (offset, request), sorted, disjoint ranges
    for time, is_start, i in events:
        entry = (offsets[i], i)
        at = bisect.bisect_left(alive, entry)
        if not is_start:
            del alive[at]
            continue
        end = offsets[i] + requests[i].size
        for offset, other in alive[max(at - 1, 0) : at + 1]:
            if offset < end and offsets[i] < offset + requests[other].size:
                detail = (
                    f"at time {time} '{requests[i].id}' [{offsets[i]}, {end}) meets "
                    f"'{requests[other].id}' [{offset}, {offset + requests[other].size})"
                )
                ids = (requests[i].id, requests[other].id)
                return Violation(rule=Rule.OVERLAP, request_ids=ids, detail=detail)
        alive.insert(at, entry)
    return None


def validate(problem: Problem, offsets: Sequence[int], *, capacity: int | None = None) -> None:
    """Raise `InvalidPlacementError` that names the broken rule and the requests."""
    violation = find_violation(problem, offsets, capacity=capacity)
    if violation is not None:
        raise InvalidPlacementError(f"broken rule: {violation.rule.value}; {violation.detail}")
