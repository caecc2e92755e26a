"""The portfolio of heuristics of one section: several orders, the best of them with repair.

Effort is counted in passes, so that a seed always gives the same placement;
only the deadline can cut it short. The orders after the first run beside each
other in threads, as compiled passes release the interpreter lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from memo_solver import first_fit
from memo_solver.outcome import Outcome, SearchResult, StopFlag
from memo_solver.params import SolveParams
from memo_solver.race import Task, race
from memo_solver.section_state import SectionState
from memo_solver.sections import Section

SHORT = 30_000
"""Placements of single requests that an order may cost at first."""
TURN = 250_000
"""And in its first turn beside exact search, where all repaired orders together take about a second."""
TURN_GROWTH = 2.5
MIN_PASSES = 6
NUM_REPAIRED = 4
"""Orders that are repaired: those that were best in one pass, or by the turn before."""
MAX_PASSES = 1_000_000
PYTHON_SLOWDOWN = 50
"""The Python twin gets this much less work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Budget:
    """What every order of one run gets: target in units, passes, first seed, deadline."""

    target: int
    passes: int
    seed: int
    deadline: float


@dataclass(frozen=True, slots=True)
class _Repair:
    """One order with its repair, as a search of the race: undecided unless it reaches the target."""

    state: SectionState
    name: str
    """Of the order. It is made when its turn comes: sorting then goes on beside the compiled passes."""
    target: int
    max_passes: int
    seed: int
    deadline: float
    results: dict[str, SearchResult]
    """By the name of the order."""

    def __call__(self, stop: StopFlag) -> SearchResult:
        if time.monotonic() >= self.deadline:
            return SearchResult(outcome=Outcome.LIMIT)
        state, order = self.state, self.state.order(self.name)
        seconds = max(self.deadline - time.monotonic(), 0.0)
        if state.compiled is not None:
            result = state.compiled.squeaky_wheel(
                order, num_fixed=len(state.fixed), target=self.target,
                max_passes=self.max_passes, seed=self.seed, stop=stop, seconds=seconds,
            )  # fmt: skip
        else:
            result = first_fit.squeaky_wheel(
                state.section, order, num_fixed=len(state.fixed), target=self.target,
                max_passes=self.max_passes, seed=self.seed, stop=stop, seconds=seconds,
            )  # fmt: skip
        self.results[self.name] = result
        if result.offsets is None or peak_of(state.section, result.offsets) > self.target:
            return SearchResult(outcome=Outcome.LIMIT, effort=result.effort)
        return result


def peak_of(section: Section, offsets: tuple[int, ...]) -> int:
    """Highest end of a placement, in units."""
    return max(offset + size for offset, size in zip(offsets, section.size, strict=True))


def improve(
    state: SectionState,
    *,
    target: int,
    params: SolveParams,
    deadline: float,
    on_gain: Callable[[], None],
) -> None:
    """Offer the state the best placement of the portfolio, briefly repaired; stop early at the target."""
    threads = _threads(state, params)
    _sample(state, target=target, threads=threads, deadline=deadline, on_gain=on_gain)
    if state.peak_units is not None and (state.peak_units <= target or time.monotonic() >= deadline):
        return
    budget = _Budget(
        target=target,
        passes=_passes(state, SHORT),
        seed=params.seed * 7919 + SHORT,
        deadline=deadline,
    )
    _repair_best(state, state.ranking[:NUM_REPAIRED], budget, threads, on_gain)


def repair(
    state: SectionState,
    *,
    target: int,
    params: SolveParams,
    deadline: float,
    on_gain: Callable[[], None],
    turn: int,
) -> None:
    """Repair the incumbent and the best orders for longer: turns 0, 1, ... cost more each time.

    Which order comes to the target, and after how many passes, is luck: on one training step one of two that were
    equally good at first comes to the bound in 115 passes, and the other is stuck above it after thousands.
    """
    if time.monotonic() >= deadline:
        return
    budget = _Budget(
        target=target,
        passes=_passes(state, int(TURN * TURN_GROWTH**turn)),
        seed=params.seed * 7919 + 104_729 * (turn + 1),
        deadline=deadline,
    )
    _repair_best(state, ["incumbent", *state.ranking[:NUM_REPAIRED]], budget, _threads(state, params), on_gain)


def _threads(state: SectionState, params: SolveParams) -> int:
    return max(1, params.threads) if state.compiled is not None else 1


def _passes(state: SectionState, work: int) -> int:
    """Passes over the section that ``work`` placements of single requests are."""
    work = work if state.compiled is not None else work // PYTHON_SLOWDOWN
    return min(max(work // state.section.num_requests, MIN_PASSES), MAX_PASSES)


def _repair_best(
    state: SectionState, names: list[str], budget: _Budget, threads: int, on_gain: Callable[[], None]
) -> None:
    """Repair the orders ``names`` and rank the orders by what they came to."""
    peaks = _run(state, [names[k::threads] for k in range(threads)], budget, on_gain)
    # Orders that were repaired come first: what they were repaired to says more than a first pass.
    rest = [name for name in state.ranking if name not in peaks]
    state.ranking = [*sorted((name for name in state.ranking if name in peaks), key=peaks.__getitem__), *rest]


def _sample(
    state: SectionState, *, target: int, threads: int, deadline: float, on_gain: Callable[[], None]
) -> None:
    """One pass of every order. Which is best differs by tens of per cent from one kind of trace to another."""
    names = state.ranking
    if state.peak_units is None:
        # A placement must exist even when the time is over at once: one pass, no deadline.
        # In this thread, as there may be thousands of sections.
        results: dict[str, SearchResult] = {}
        _Repair(state, names[0], target, 1, 0, float("inf"), results)(StopFlag())
        offsets = results[names[0]].offsets
        if offsets is not None and state.offer(offsets):
            on_gain()
    if state.peak_units is None or state.peak_units <= target or time.monotonic() >= deadline:
        return
    budget = _Budget(target=target, passes=1, seed=0, deadline=deadline)
    peaks = _run(state, [names[k::threads] for k in range(threads)], budget, on_gain)
    last = max(peaks.values(), default=0) + 1
    state.ranking = sorted(names, key=lambda name: peaks.get(name, last))


def push_down(state: SectionState, *, target: int, params: SolveParams, deadline: float) -> None:
    """Let the incumbent sink, then repair its order briefly."""
    budget = _Budget(target=target, passes=MIN_PASSES, seed=params.seed, deadline=deadline)
    _run(state, [["incumbent"]], budget, _ignore)


def _ignore() -> None:
    pass


def _run(
    state: SectionState,
    groups: list[list[str]],
    budget: _Budget,
    on_gain: Callable[[], None],
) -> dict[str, int]:
    """Race the orders of the groups, one group a thread; returns the peaks that they reached."""
    results: list[dict[str, SearchResult]] = [{} for _ in groups]
    lanes = []
    for lane, group in enumerate(groups):
        tasks = []
        for number, name in enumerate(group):
            repair = _Repair(
                state, name, budget.target, budget.passes, budget.seed + 101 * lane + number,
                budget.deadline, results[lane],
            )  # fmt: skip
            tasks.append(Task(name=name, run=repair))
        lanes.append(tasks)
    try:
        verdict = race(lanes)
        if verdict is not None and verdict.result.offsets is not None:
            results = [{verdict.name: verdict.result}]
    finally:
        # Also after Ctrl-C: what was found so far counts.
        found = {name: r.offsets for lane in results for name, r in list(lane.items()) if r.offsets is not None}
        for offsets in found.values():
            if state.offer(offsets):
                on_gain()
    return {name: peak_of(state.section, offsets) for name, offsets in found.items()}
