"""The lanes of the race for one question: does this section fit in this height?

Round 0 is short and native only. Later rounds give every lane about the same
share of time (measured in nodes and deterministic time) and grow by 2.5, so that
at most two thirds as much again is lost to restarting.
"""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass, replace

from memo_solver import cpsat, native, orders, python_search
from memo_solver.errors import MissingSolverError
from memo_solver.outcome import Outcome, SearchResult, StopFlag
from memo_solver.params import SolveParams, Switch
from memo_solver.race import Task
from memo_solver.sections import Section

MAX_EXACT_REQUESTS = 2500
"""Sections above this are left to the heuristics: no exact search comes near them."""
ROUND_SECONDS = 1.2
"""Aim for one lane in round 1, on a core of 2024; only the ratio between lanes matters."""
ROUND_GROWTH = 2.5
VALLEY_NODES = 750_000
CANONICAL_NODES = 8_000
SHAKEN_NODES = 80_000
PYTHON_NODES = 3_000
"""Nodes a second, roughly, times the share of a lane that each search gets."""
TIGHT_SLACK = 0.08
"""Mean slack below which the valley search gets most of the time: it is made for that."""
PERFECT_SLACK = 0.02
"""Mean slack below which CP-SAT still decides, late, what the valley search does not: it gets more time."""
CPSAT_DETERMINISTIC = 0.06
"""CP-SAT's deterministic seconds per second."""
IMPORT_SECONDS = 2.0
"""Time left below which OR-Tools is not imported any more."""


def mean_slack(section: Section, height: int) -> float:
    """Share of a height (units) that is free, over all slots: 0 in a perfect packing."""
    return 1.0 - sum(section.loads()) / (max(height, 1) * section.num_slots)


def is_perfect(section: Section, height: int) -> bool:
    """Whether a placement of this height would leave next to nothing free."""
    return mean_slack(section, height) < PERFECT_SLACK


def is_tight(section: Section, height: int) -> bool:
    """Whether it would leave so little that the valley search is good at it."""
    return mean_slack(section, height) < TIGHT_SLACK


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One section, one height (in units), and the time left."""

    section: Section
    capacity: int
    round_index: int
    deadline: float

    @property
    def mean_slack(self) -> float:
        """Share of the capacity that is free, over all slots: 0 in a perfect packing."""
        return mean_slack(self.section, self.capacity)

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline, never negative."""
        return max(self.deadline - time.monotonic(), 0.0)


@dataclass(frozen=True, slots=True)
class _Canonical:
    question: Question
    order: list[int]
    max_nodes: int
    compiled: native.NativeSection | None
    shake: tuple[float, str] | None = None
    """Noise and seed of a shaken order."""

    def __call__(self, stop: StopFlag) -> SearchResult:
        question = self.question
        order = self.order
        if self.shake is not None:
            order = orders.shaken(order, noise=self.shake[0], seed=self.shake[1])
        if self.compiled is not None:
            return self.compiled.canonical_search(
                order, capacity=question.capacity, max_nodes=self.max_nodes, stop=stop,
                seconds=question.seconds_left,
            )  # fmt: skip
        return python_search.canonical_search(
            question.section, order, capacity=question.capacity, max_nodes=self.max_nodes,
            stop=stop, seconds=question.seconds_left,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Valley:
    question: Question
    seed: int
    max_nodes: int
    compiled: native.NativeSection

    def __call__(self, stop: StopFlag) -> SearchResult:
        question = self.question
        return self.compiled.valley_search(
            capacity=question.capacity, seed=self.seed, max_nodes=self.max_nodes, stop=stop,
            seconds=question.seconds_left,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _CpSat:
    question: Question
    limits: cpsat.CpSatLimits
    needed: bool

    def __call__(self, stop: StopFlag) -> SearchResult:
        limits = replace(self.limits, seconds=self.question.seconds_left)
        try:
            return cpsat.search(self.question.section, capacity=self.question.capacity, limits=limits, stop=stop)
        except MissingSolverError as error:
            if self.needed:
                raise
            _warn_once(str(error.__cause__ or error))
            return SearchResult(outcome=Outcome.LIMIT)


@functools.cache
def _warn_once(reason: str) -> None:
    """OR-Tools is missing or broken; that is said once, and the other searches go on."""
    logging.getLogger("memo_solver").warning("searching without CP-SAT: OR-Tools cannot be imported: %s", reason)


def build_lanes(
    question: Question, params: SolveParams, compiled: native.NativeSection | None
) -> list[list[Task]]:
    """Lanes of a round, the preferred first; one lane per thread at most."""
    if question.section.num_requests > MAX_EXACT_REQUESTS:
        return []
    if question.round_index == 0:
        return [_own_searches(question, params, compiled, seconds=0.1)]
    seconds = ROUND_SECONDS * ROUND_GROWTH ** (question.round_index - 1)
    own = _own_searches(question, params, compiled, seconds=seconds)
    lucky = question.round_index > 1 and question.mean_slack < TIGHT_SLACK
    perfect = question.mean_slack < PERFECT_SLACK
    exact = _cpsat_lanes(question, params, seconds=seconds * ((0.5 if perfect else 0.25) if lucky else 1.0))
    if exact and lucky:
        # What CP-SAT has not decided by now it seldom does; another seed of the valley search more often, since
        # how long that takes differs a hundredfold from seed to seed.
        exact[0] = [*_valley_searches(question, params, compiled, seconds=1.5 * seconds, lane=1), *exact[0]]
    lanes = [own, *exact]
    if params.threads >= 3 and compiled is not None:
        lanes = [own[:1], own[1:], *exact]
    if params.threads < len(lanes):
        kept = lanes[: params.threads - 1] if params.threads > 1 else []
        merged = [task for lane in lanes[len(kept) : max(params.threads, 2)] for task in lane]
        return [*kept, merged]
    return lanes


def _own_searches(
    question: Question, params: SolveParams, compiled: native.NativeSection | None, *, seconds: float
) -> list[Task]:
    section = question.section
    tight = is_tight(section, question.capacity)
    tasks = _valley_searches(question, params, compiled, seconds=seconds, lane=0)
    nodes = CANONICAL_NODES if compiled is not None else PYTHON_NODES // 5
    if tight and compiled is not None:
        nodes //= 4
    for number, order in enumerate(orders.exact_orders(section)):
        effort = int(nodes * seconds)
        if compiled is not None:
            effort = max(effort, 2 * section.num_requests)  # down to the last request at least
        canonical = _Canonical(question, order, effort, compiled)
        tasks.append(Task(name=f"canonical search {number}", run=canonical))
    if compiled is not None and question.round_index > 0:
        # Its nodes cost more the more room there is, and there the valley search finds more in the time as well.
        share = seconds / ((8 if question.mean_slack < PERFECT_SLACK else 16) if tight else 2)
        tasks += _shaken_searches(question, params, compiled, seconds=share)
    return tasks


def _valley_searches(
    question: Question, params: SolveParams, compiled: native.NativeSection | None, *, seconds: float, lane: int
) -> list[Task]:
    """One valley search, or none where it cannot be; each lane and round has its own seed."""
    if compiled is None or any(alignment != 1 for alignment in question.section.alignment):
        return []
    seed = params.seed * 1000 + question.round_index + 100 * lane
    return [Task(name="valley search", run=_Valley(question, seed, int(VALLEY_NODES * seconds), compiled))]


def _shaken_searches(
    question: Question, params: SolveParams, compiled: native.NativeSection, *, seconds: float
) -> list[Task]:
    """Many short canonical searches, each with a slightly different order."""
    base = orders.exact_orders(question.section)
    max_nodes = 4 * question.section.num_requests
    tasks = []
    for number in range(int(SHAKEN_NODES * seconds) // max_nodes + 1):
        noise = (0.03, 0.03, 0.1)[number % 3]
        seed = f"{params.seed} {question.round_index} {number}"
        order = base[number % len(base)]
        canonical = _Canonical(question, order, max_nodes, compiled, (noise, seed))
        tasks.append(Task(name="canonical search, shaken", run=canonical))
    return tasks


def _cpsat_lanes(question: Question, params: SolveParams, *, seconds: float) -> list[list[Task]]:
    if params.cpsat is Switch.OFF:
        return []
    if params.cpsat is Switch.AUTO and not cpsat.available():
        _warn_once("it is not installed: pip install ortools")
        return []
    if params.cpsat is Switch.AUTO and not cpsat.imported() and question.seconds_left < IMPORT_SECONDS:
        return []  # importing it would hold the interpreter past the limit
    if not question.section.fits_native:
        return []  # CP-SAT's own arithmetic is 64-bit too
    strategies = list(cpsat.Strategy)
    num_lanes = max(1, params.threads - 2)
    lanes = []
    for lane in range(num_lanes):
        tasks = []
        for strategy in strategies:
            limits = cpsat.CpSatLimits(
                seconds=question.seconds_left,
                deterministic_time=CPSAT_DETERMINISTIC * seconds / len(strategies),
                seed=params.seed + lane + 100 * question.round_index,
                strategy=strategy,
            )
            run = _CpSat(question, limits, params.cpsat is Switch.ON)
            tasks.append(Task(name=f"CP-SAT ({strategy.value})", run=run))
        # Lanes begin with different strategies, so that each gets its turn early.
        shift = lane % len(tasks)
        lanes.append(tasks[shift:] + tasks[:shift])
    return lanes
