"""`solve`: bounds, then heuristics, then exact search, then the validator.

The question is either "how low can the peak be?" (no capacity) or "does it fit?"
(capacity). Sections are independent, and only the worst one matters: each is
searched down to the target, which is the capacity or the highest lower bound of
all sections, whichever applies; no section is ever pushed below that.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from memo_solver import cpsat, heuristics, native
from memo_solver.bounds import peak_load
from memo_solver.errors import InputError, MissingSolverError
from memo_solver.lanes import MAX_EXACT_REQUESTS, Question, build_lanes, is_perfect, is_tight
from memo_solver.outcome import Outcome
from memo_solver.params import Progress, ProgressListener, SolveParams, Switch
from memo_solver.race import race
from memo_solver.records import Placement, Problem, Proof, Solution, Stage, Status
from memo_solver.section_state import SectionState
from memo_solver.sections import Section, split
from memo_solver.validator import validate

MAX_ROUNDS = 12
"""Rounds of exact search; the last ones are days long, so the deadline always comes first."""


def solve(
    problem: Problem,
    params: SolveParams | None = None,
    *,
    progress: ProgressListener | None = None,
    hint: Placement | None = None,
    fixed: tuple[str, ...] = (),
) -> Solution:
    """Place every request; the answer says how good it is (see `Solution`).

    With a capacity, OPTIMAL means that it fits. Ctrl-C and the time limit return
    the best placement so far. `hint` is a placement to start from and to beat.
    `fixed` names requests that are placed first, in this order, by every
    heuristic; with them there is no exact search (see cyclic.py).
    """
    return _Solve(problem, params or SolveParams(), progress, hint, fixed).run()


@dataclass(slots=True)
class _Clock:
    start: float
    last: float

    def lap(self) -> float:
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        return seconds


MIN_REPAIRED_REQUESTS = 500
"""Sections above this, unless they are tight, get a turn of repair before each round of exact search."""
VALIDATION_SECONDS = 1.5e-5
"""Time kept for the validator, per request."""


def _is_searched(state: SectionState) -> bool:
    """Whether exact search is for this section; the others are only repaired."""
    return not state.fixed and state.section.num_requests <= MAX_EXACT_REQUESTS


class _Solve:
    """One solve, stage by stage."""

    def __init__(
        self,
        problem: Problem,
        params: SolveParams,
        progress: ProgressListener | None,
        hint: Placement | None,
        fixed: tuple[str, ...],
    ) -> None:
        if params.cpsat is Switch.ON and not cpsat.available():
            raise MissingSolverError("CP-SAT was asked for and OR-Tools is missing: pip install ortools")
        if params.native is Switch.ON and not native.native_status().available:
            raise MissingSolverError(f"compiled search was asked for: {native.native_status().reason}")
        now = time.monotonic()
        self.problem = problem
        self.params = params
        self.progress = progress
        self.hint = hint
        self.fixed = {name: rank for rank, name in enumerate(fixed)}
        self.clock = _Clock(start=now, last=now)
        # Some time is kept for the validator and for threads that are slow to wake up.
        kept = 0.05 * min(params.time_limit_seconds, 8.0) + VALIDATION_SECONDS * len(problem.requests)
        self.deadline = now + max(params.time_limit_seconds - kept, 0.5 * params.time_limit_seconds)
        self.states: list[SectionState] = []
        self.is_split = False
        self.stages: list[Stage] = []
        self.interrupted = False
        self.told, self.tell_next = "", 0.0

    def run(self) -> Solution:
        """All stages; each may end the solve early."""
        refused = self._refuse_by_load()
        if refused is not None:
            return refused
        try:
            self.states = [self._state(section) for section in split(self.problem)]
            self.is_split = True
            self._close_stage("reductions and bounds", f"{len(self.states)} sections")
            if not self._too_small():
                if self.hint is not None:
                    self._take_hint(self.hint)
                self._run_heuristics()
                if self.params.exact is not Switch.OFF:
                    self._run_exact()
        except KeyboardInterrupt:
            self.interrupted = True
            self._close_stage("interrupted", "")
        try:
            return self._solution()
        except KeyboardInterrupt:
            # Ctrl-C during the last validation: what was found is not lost to it. A second one ends it.
            self.interrupted = True
            return self._solution()

    def _refuse_by_load(self) -> Solution | None:
        """Answer at once when the requests alive at one time exceed the capacity."""
        if self.problem.capacity is None:
            return None
        proof = peak_load(self.problem)
        if proof.bound <= self.problem.capacity:
            return None
        self._close_stage("peak load", "above the capacity")
        return Solution(
            status=Status.INFEASIBLE,
            placement=None,
            lower_bound=proof.bound,
            proof=proof,
            stages=tuple(self.stages),
        )

    def _state(self, section: Section) -> SectionState:
        use_native = self.params.native is not Switch.OFF and native.usable_for(section)
        names = [self.problem.requests[i].id for i in section.index]
        fixed = [k for k, name in enumerate(names) if name in self.fixed] if self.fixed else []
        fixed.sort(key=lambda k: self.fixed[names[k]])
        return SectionState(section, use_native=use_native, fixed=tuple(fixed))

    # What is known

    @property
    def bound(self) -> int:
        return max((state.lower_bound for state in self.states), default=0)

    @property
    def target(self) -> int:
        """Height (bytes) below which nothing is gained."""
        return self.bound if self.problem.capacity is None else self.problem.capacity

    @property
    def peak(self) -> int | None:
        if not self.is_split:
            return None
        peaks = [state.peak for state in self.states]
        return None if None in peaks else max((p for p in peaks if p is not None), default=0)

    def _too_small(self) -> bool:
        return self.problem.capacity is not None and self.bound > self.problem.capacity

    def _above_target(self) -> list[SectionState]:
        """Sections still above the target, the smallest first: they answer soonest."""
        target = self.target
        above = [s for s in self.states if s.peak is None or s.peak > target]
        return sorted(above, key=lambda s: s.section.num_requests)

    def _tell(self, stage: str) -> None:
        now = time.monotonic()
        if self.progress is None or (stage == self.told and now < self.tell_next):
            return
        state = Progress(stage=stage, peak=self.peak, lower_bound=self.bound, seconds=now - self.clock.start)
        self.told, self.tell_next = stage, now + max(0.05, 20 * (time.monotonic() - now))
        self.progress(state)

    def _close_stage(self, name: str, note: str) -> None:
        self.stages.append(Stage(name=name, seconds=self.clock.lap(), peak=self.peak, note=note))
        self._tell(name)

    # Stages

    def _take_hint(self, hint: Placement) -> None:
        offsets = hint.by_id()
        if any(r.id not in offsets for r in self.problem.requests):
            raise InputError("the hint is a placement of another problem: a request of this one has no offset in it")
        validate(self.problem, [offsets[r.id] for r in self.problem.requests], capacity=2**64)
        target = self.target
        for state in self.states:
            section = state.section
            placed = [offsets[self.problem.requests[i].id] for i in section.index]
            if all(offset % section.unit == 0 for offset in placed):
                state.offer(tuple(offset // section.unit for offset in placed))
                heuristics.push_down(
                    state, target=target // section.unit, params=self.params, deadline=self.deadline
                )

    def _run_heuristics(self) -> None:
        # The target is asked for once: there may be thousands of sections, and it costs a pass over all.
        target = self.target
        for state in self._above_target():
            heuristics.improve(
                state,
                target=target // state.section.unit,
                params=self.params,
                deadline=self.deadline,
                on_gain=lambda: self._tell("heuristics"),
            )
        self._close_stage("heuristics", "first fit with repair of the order")

    def _run_exact(self) -> None:
        used: set[str] = set()
        if not self._above_target() or self._too_small():
            return
        for round_index in range(MAX_ROUNDS):
            open_states = self._above_target()
            if not open_states or self._too_small():
                break
            for state in open_states:
                if time.monotonic() >= self.deadline:
                    break
                if self._is_repaired(state):
                    self._repair(state, round_index)
                if _is_searched(state):
                    self._search_down(state, round_index, used)
        self._close_stage("exact search and repair", ", ".join(sorted(used)) or "undecided")

    def _is_repaired(self, state: SectionState) -> bool:
        """Whether a better order is likely to be found sooner than by exact search, or there is no exact search.

        In a tight packing there is no better order, and few requests are searched through at once.
        """
        if not _is_searched(state):
            return True
        tight = is_tight(state.section, self.target // state.section.unit)
        return state.section.num_requests > MIN_REPAIRED_REQUESTS and not tight

    def _repair(self, state: SectionState, turn: int) -> None:
        heuristics.repair(
            state,
            target=self.target // state.section.unit,
            params=self.params,
            deadline=self.deadline,
            on_gain=lambda: self._tell("repair"),
            turn=turn,
        )

    def _search_down(self, state: SectionState, round_index: int, used: set[str]) -> None:
        """Ask for the target and, while it is not decided, for heights between it and the incumbent.

        A perfect packing is found or not: most of the time goes to the target. Others have a lowest height that
        search reaches, and it may be far from the target, where a whole round is spent in vain: from round 1 on
        the incumbent is lowered as well, and first where there is much room.
        """
        minimise = self.problem.capacity is None
        height = self.target // state.section.unit
        perfect, roomy = is_perfect(state.section, height), not is_tight(state.section, height)
        lowered = minimise and roomy and round_index > 0
        if lowered:
            self._descend(state, round_index, used)
        while state.peak is None or state.peak > self.target:
            height = self.target // state.section.unit
            if self._ask(state, height, round_index, used) is not None:
                if self._too_small():
                    return
                continue
            if not minimise or lowered:
                return
            if round_index == 0 or (perfect and round_index % 2 == 0):
                self._bisect(state, height, round_index, used)
            elif not perfect:
                self._descend(state, round_index, used)
            return

    def _descend(self, state: SectionState, round_index: int, used: set[str]) -> None:
        """Lower the incumbent by steps, each twice the last, until one is not decided or reaches the target."""
        step = state.step or max(1, state.bound // 200)
        while state.peak_units is not None and state.peak_units - step > self.target // state.section.unit:
            answer = self._ask(state, state.peak_units - step, round_index, used)
            if answer is Outcome.FOUND:
                step *= 2
                continue
            step = max(1, step // 2)
            if answer is None:
                break
        state.step = step

    def _bisect(self, state: SectionState, low: int, round_index: int, used: set[str]) -> None:
        """Lower the incumbent towards a height that was not decided.

        Round 0 is cheap and goes on past heights that it cannot decide, to within
        a half per cent; later rounds spend as much as round 1 and stop at the first of those.
        """
        while state.peak_units is not None and state.peak_units - low > max(1, state.bound // 200):
            middle = (low + state.peak_units) // 2
            answer = self._ask(state, middle, min(round_index, 1), used)
            if answer is None and round_index > 0:
                return
            if answer is not Outcome.FOUND:
                low = middle

    def _ask(
        self, state: SectionState, height: int, round_index: int, used: set[str]
    ) -> Outcome | None:
        """Race for one height; None when undecided. Updates the incumbent or the bound."""
        if time.monotonic() >= self.deadline:
            return None
        capacity = state.floor_height(height)
        if capacity < state.bound:
            state.exclude(height)
            return Outcome.INFEASIBLE
        question = Question(
            section=state.section, capacity=capacity, round_index=round_index, deadline=self.deadline
        )
        verdict = race(build_lanes(question, self.params, state.compiled), self.deadline)
        if verdict is None:
            return None
        used.add(verdict.name)
        if verdict.result.outcome is Outcome.INFEASIBLE:
            state.exclude(height)
        elif verdict.result.offsets is not None:
            state.offer(verdict.result.offsets)
        self._tell("exact search")
        return verdict.result.outcome

    # The answer

    def _solution(self) -> Solution:
        placement = self._placement()
        bound = self.bound
        proof = self._proof(bound)
        capacity = self.problem.capacity
        if capacity is not None and bound > capacity:
            status, placement = Status.INFEASIBLE, None
        elif placement is None:
            status = Status.UNKNOWN
        elif capacity is not None:
            fits = placement.peak <= capacity
            status = Status.OPTIMAL if fits else Status.UNKNOWN
            placement = placement if fits else None
        else:
            status = Status.OPTIMAL if placement.peak <= bound else Status.FEASIBLE
        return Solution(
            status=status,
            placement=placement,
            lower_bound=bound,
            proof=proof,
            stages=tuple(self.stages),
            interrupted=self.interrupted,
        )

    def _placement(self) -> Placement | None:
        if not self.is_split:
            return None  # interrupted before the sections were known
        offsets = [0] * len(self.problem.requests)
        for state in self.states:
            if state.offsets is None:
                return None
            for i, offset in zip(state.section.index, state.offsets, strict=True):
                offsets[i] = offset * state.section.unit
        free = Problem(requests=self.problem.requests)
        validate(free, offsets)
        self._close_stage("validation", "")
        return Placement(problem=self.problem, offsets=tuple(offsets))

    def _proof(self, bound: int) -> Proof | None:
        for state in self.states:
            if state.lower_bound == bound:
                return state.proof(self.problem)
        return None
