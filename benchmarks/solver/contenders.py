"""Other planners on the same instance, in a process of their own with a hard limit."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from memo_solver import Placement, Problem, SolveParams, solve
from memo_solver.outcome import Outcome, StopFlag
from memo_solver.sections import split
from memo_solver.validator import find_violation

Answer = tuple[int | None, str]
"""Peak of a valid placement (None without one), and what the contender said."""
Contender = Callable[[Problem, float], Answer]
"""Places a problem in so many seconds."""


def memo(problem: Problem, seconds: float) -> Answer:
    """This package, at its defaults."""
    solution = solve(problem, SolveParams(time_limit_seconds=seconds))
    return solution.peak, solution.status.value


def bare_cpsat(problem: Problem, seconds: float) -> Answer:
    """CP-SAT alone at its defaults (8 workers): one no-overlap per maximal live set."""
    from ortools.sat.python import cp_model

    from memo_solver import cpsat

    assert problem.capacity is not None
    offsets = [0] * len(problem.requests)
    end = time.monotonic() + seconds
    for section in split(problem):
        limits = cpsat.CpSatLimits(seconds=end - time.monotonic(), num_workers=8)
        result = cpsat.search(
            section, capacity=problem.capacity // section.unit, limits=limits, stop=StopFlag()
        )
        if result.outcome is not Outcome.FOUND or result.offsets is None:
            return None, f"{result.outcome.name.lower()} ({cp_model.__name__})"
        for i, offset in zip(section.index, result.offsets, strict=True):
            offsets[i] = offset * section.unit
    return _judged(problem, offsets), "found"


def omnimalloc(allocator: str) -> Contender:
    """One allocator of the omnimalloc package, by its name there."""
    return _Omnimalloc(allocator)


class _Omnimalloc:
    def __init__(self, allocator: str) -> None:
        self.allocator = allocator

    def __call__(self, problem: Problem, seconds: float) -> Answer:
        import omnimalloc as om
        from omnimalloc.allocators.supermalloc import SupermallocAllocator

        allocations = [
            om.Allocation(id=k, size=r.size, start=r.lower, end=r.upper)
            for k, r in enumerate(problem.requests)
        ]
        if self.allocator == "supermalloc":
            # Its own default limit is 3 s; it gets as long as everybody else.
            placed = om.allocate(allocations, SupermallocAllocator(timeout=seconds))
        else:
            placed = om.allocate(allocations, self.allocator)
        by_id = {a.id: a.offset for a in placed}
        offsets = [by_id[k] for k in range(len(problem.requests))]
        if any(offset is None for offset in offsets):
            return None, "no offsets"
        return _judged(problem, offsets), "found"


def _judged(problem: Problem, offsets: list[int]) -> int | None:
    free = Problem(requests=problem.requests)
    if find_violation(free, offsets) is not None:
        return None
    return Placement(problem=free, offsets=tuple(offsets)).peak


def _child(
    contender: Contender, problem: Problem, seconds: float, pipe: Connection
) -> None:
    try:
        peak, said = contender(problem, seconds)
    except Exception as error:
        peak, said = None, f"{type(error).__name__}: {error}"
    pipe.send((peak, said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))


def timed(
    contender: Contender, problem: Problem, seconds: float
) -> dict[str, Any]:
    """Run a contender with `seconds` (a tenth and a second more before it is ended)."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(contender, problem, seconds, theirs))
    start = time.monotonic()
    process.start()
    finished = mine.poll(seconds * 1.1 + 1.0)
    peak, said, rss = mine.recv() if finished else (None, "ended at the limit", None)
    elapsed = time.monotonic() - start
    process.kill()
    process.join()
    return {"peak": peak, "said": said, "seconds": round(elapsed, 3), "peak_rss_mib": rss}
