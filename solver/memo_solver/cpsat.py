"""Exact search by OR-Tools CP-SAT: the only module that imports ortools.

One `AddNoOverlap` per maximal live set, over address intervals only: times are
fixed, so a two-dimensional constraint adds nothing and costs half the speed.
One worker with a deterministic limit gives the same answer on every machine.
"""

from __future__ import annotations

import enum
import sys
import threading
from dataclasses import dataclass
from typing import Any

from memo_solver.errors import MissingSolverError
from memo_solver.outcome import Outcome, SearchResult, StopFlag
from memo_solver.sections import Section


class Strategy(enum.Enum):
    """Search strategies of CP-SAT that solve different instances (none covers the others)."""

    DEFAULT = "default"
    QUICK_RESTART = "quick restart, no linear relaxation"
    FIXED = "fixed order"


@dataclass(frozen=True, slots=True, kw_only=True)
class CpSatLimits:
    """How long CP-SAT may search; deterministic time is CP-SAT's own measure of effort."""

    seconds: float
    deterministic_time: float = float("inf")
    num_workers: int = 1
    seed: int = 0
    strategy: Strategy = Strategy.DEFAULT


def available() -> bool:
    """Whether OR-Tools can be imported."""
    import importlib.util

    return importlib.util.find_spec("ortools") is not None


def imported() -> bool:
    """Whether OR-Tools is imported already, which takes about a second."""
    return "ortools.sat.python.cp_model" in sys.modules


def search(section: Section, *, capacity: int, limits: CpSatLimits, stop: StopFlag) -> SearchResult:
    """Look for a placement below `capacity` (in units)."""
    cp_model = _import()
    if max(section.size) > capacity:
        return SearchResult(outcome=Outcome.INFEASIBLE)
    model, starts = _model(cp_model, section, capacity)
    solver = cp_model.CpSolver()
    parameters = solver.parameters
    parameters.num_workers = limits.num_workers
    parameters.random_seed = limits.seed % 2**31
    parameters.max_time_in_seconds = max(limits.seconds, 0.001)
    if limits.deterministic_time != float("inf"):
        parameters.max_deterministic_time = limits.deterministic_time
    if limits.strategy is Strategy.QUICK_RESTART:
        parameters.linearization_level = 0
        parameters.search_branching = cp_model.PORTFOLIO_WITH_QUICK_RESTART_SEARCH
    elif limits.strategy is Strategy.FIXED:
        parameters.search_branching = cp_model.FIXED_SEARCH
    watcher = _Watcher(solver, stop)
    status = watcher.run(model)
    effort = int(solver.num_branches)
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        offsets = tuple(
            int(solver.value(start)) * alignment
            for start, alignment in zip(starts, section.alignment, strict=True)
        )
        return SearchResult(outcome=Outcome.FOUND, offsets=offsets, effort=effort)
    if status == cp_model.INFEASIBLE:
        return SearchResult(outcome=Outcome.INFEASIBLE, effort=effort)
    if status != cp_model.UNKNOWN:
        raise AssertionError(f"CP-SAT refused the model: {solver.status_name(status)}")
    outcome = Outcome.STOPPED if stop.is_set() else Outcome.LIMIT
    return SearchResult(outcome=outcome, effort=effort)


def _import() -> Any:  # noqa: ANN401 - a module without types
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise MissingSolverError("CP-SAT was asked for and OR-Tools is missing: pip install ortools") from error
    return cp_model


def _model(cp_model: Any, section: Section, capacity: int) -> tuple[Any, list[Any]]:  # noqa: ANN401
    model = cp_model.CpModel()
    starts: list[Any] = []
    intervals: list[Any] = []
    for size, alignment in zip(section.size, section.alignment, strict=True):
        start = model.new_int_var(0, (capacity - size) // alignment, "")
        starts.append(start)
        intervals.append(model.new_fixed_size_interval_var(start * alignment, size, ""))
    for slot in range(section.num_slots):
        model.add_no_overlap([intervals[i] for i in section.members(slot)])
    for i in range(section.num_requests - 1):
        # Neighbours of one shape are interchangeable: keep them in one order.
        if _shape(section, i) == _shape(section, i + 1):
            model.add(starts[i] <= starts[i + 1])
    return model, starts


def _shape(section: Section, i: int) -> tuple[int, int, int, int]:
    return section.first[i], section.last[i], section.size[i], section.alignment[i]


class _Watcher:
    """Passes a stop flag on to a running solver."""

    def __init__(self, solver: Any, stop: StopFlag) -> None:  # noqa: ANN401
        self._solver = solver
        self._stop = stop
        self._done = threading.Event()

    def run(self, model: Any) -> int:  # noqa: ANN401
        """Solve, polling the flag 50 times a second from a thread of its own."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            return int(self._solver.solve(model))
        finally:
            self._done.set()
            thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            if self._stop.is_set():
                # A stop that comes before the search has begun is lost, so keep asking.
                self._solver.stop_search()
