"""Steps of one model, planned by themselves: which are recorded, when a plan is there, which are served by it.

    kind of step   1st, 2nd    3rd         4th ...             from then on
                   as it is    recorded    solved meanwhile    served by plan

A kind is whatever makes a step ask for other memory, such as the shapes of its batch. All kinds share one arena. A step
of which too little was served is a sign that the plan is old: after a few of them the kind is recorded again.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch

from memo_runtime.allocator.library import Counts, PlannedAllocator
from memo_runtime.arena.plan import ArenaPlan, as_arena_plan, by_size, enable
from memo_runtime.arena.solving import Solving
from memo_runtime.errors import AllocatorPlanError, TraceError
from memo_runtime.placement import ArenaReport
from memo_runtime.recording.allocator import AllocatorRecorder
from memo_runtime.traces.trace import Phase, Trace
from memo_runtime.units import format_bytes

logger = logging.getLogger("memo_runtime")

#: Steps of a kind before it is recorded: the first ones make optimizer states, workspaces and compiled code.
SETTLING = 2
#: Share of the bytes that were planned in the recorded step, below which a step counts as another one, and how many of
#: those in a row make the plan an old one.
LEAST_SHARE = 0.98
MOST_WEAK = 3
#: How often a kind is recorded before it is left to PyTorch's allocator.
MOST_TRIES = 3
#: Kinds that are remembered; a run may have a new length at every step.
MOST_KINDS = 16
_SOLVER_SECONDS = 10.0
_MISSES = ("resident", "outside", "other_stream", "unplanned", "occupied", "unordered")


class Recorder(Protocol):
    """What of ``AllocatorRecorder`` is needed."""

    stream_handles: tuple[int, ...]

    def __enter__(self) -> object: ...

    def __exit__(self, kind: None, value: None, at: None) -> None: ...

    def begin(self, phase: Phase, block: str = "") -> None:
        """A span begins."""

    def end(self, phase: Phase, block: str = "") -> None:
        """It ends."""

    def trace(self) -> Trace:
        """What was recorded."""


@dataclass(slots=True)
class _Kind:
    """What is known of one kind of step."""

    seen: int = 0
    tries: int = 0
    weak: int = 0
    plan: ArenaPlan | None = None


def _recorder(device: int) -> Recorder:
    return AllocatorRecorder(torch.device("cuda", device), measure=False)


#: Who plans the memory of each device: one model, since there is one arena.
_owners: weakref.WeakValueDictionary[int, PlannedSteps] = weakref.WeakValueDictionary()


def is_planned_for_others(device: int) -> bool:
    """Whether the steps of another model are planned on ``device``."""
    owner = _owners.get(device)
    return owner is not None and not owner.closed


class PlannedSteps:
    """The steps of one model on CUDA device ``device``.

    Args:
        note: tells the user, once, what is done otherwise than asked.
    """

    def __init__(
        self,
        allocator: PlannedAllocator,
        device: int,
        note: Callable[[str], None],
        *,
        recorder: Callable[[int], Recorder] = _recorder,
        solver: Callable[..., Solving] = Solving,
    ) -> None:
        self._allocator = allocator
        self._device = device
        self._note = note
        self._make_recorder = recorder
        self._solver = solver
        self._kinds: dict[Hashable, _Kind] = {}
        self._current: _Kind | None = None
        self._armed: ArenaPlan | None = None
        self._recording: Recorder | None = None
        self._solving: tuple[_Kind, Trace, tuple[int, ...], Solving] | None = None
        self._served: tuple[Counts, ArenaPlan] | None = None
        self._given_back = allocator.statistics(device).given_back
        #: Why nothing is planned any more.
        self._off = ""
        self.closed = False
        _owners[device] = self

    # ---- steps

    def begin(self, key: Hashable) -> None:
        """A step of kind ``key`` begins, and the one before is over."""
        self.end()
        if self._off:
            return
        self._collect()
        kind = self._kinds.pop(key, None) or _Kind()
        self._kinds[key] = kind  # the latest is last
        if len(self._kinds) > MOST_KINDS:
            self._kinds.pop(next(iter(self._kinds)))
        self._current = kind
        kind.seen += 1
        if kind.plan is not None and self._arm(kind.plan):
            self._allocator.begin_step(self._device)
        elif self._wants_recording(kind):
            self._record()

    def end(self) -> None:
        """The step is over: what follows, such as an evaluation, is none of its."""
        kind, self._current = self._current, None
        if kind is None:
            return
        if self._recording is not None:
            self._solve(kind)
        elif kind.plan is not None and kind.plan is self._armed:
            self._allocator.end_step(self._device)
            self._judge(kind, kind.plan)

    def close(self) -> None:
        """Plan nothing any more; the arena goes back once nothing lives in it."""
        self._current, self.closed = None, True
        if self._recording is not None:
            self._recording.__exit__(None, None, None)
            self._recording = None
        if self._solving is not None:
            self._solving[3].close()
            self._solving = None
        self._stop("closed")

    # ---- from step to plan

    def _wants_recording(self, kind: _Kind) -> bool:
        idle = self._recording is None and self._solving is None
        if not idle or kind.plan is not None or kind.seen <= SETTLING or kind.tries >= MOST_TRIES:
            return False
        if torch._C._cuda_isHistoryEnabled():
            self._note("somebody else records the allocator's history, so no step was recorded to plan its memory")
            return False
        return True

    def _record(self) -> None:
        recorder = self._make_recorder(self._device)
        recorder.__enter__()
        recorder.begin(Phase.STEP)
        self._recording = recorder

    def _solve(self, kind: _Kind) -> None:
        recorder, self._recording = self._recording, None
        assert recorder is not None, "a step was recorded"
        recorder.end(Phase.STEP)
        recorder.__exit__(None, None, None)
        kind.tries += 1
        try:
            trace = recorder.trace()
        except TraceError as error:
            self._note(f"a step could not be recorded to plan its memory: {error}")
            return
        self._solving = kind, trace, recorder.stream_handles, self._solver(by_size(trace), seconds=_SOLVER_SECONDS)

    def _collect(self) -> None:
        if self._solving is None or not self._solving[3].done:
            return
        kind, trace, handles, solving = self._solving
        self._solving = None
        try:
            kind.plan = as_arena_plan(solving.result(), trace, handles, self._device)
        except AllocatorPlanError as error:
            self._note(f"no memory is planned for some steps: {error}")
            return
        kind.weak = 0
        plan = kind.plan
        logger.info(
            "memo: %d requests of a step placed in an arena of %s (at least %s) in %.1f s",
            len(plan.rows), format_bytes(plan.size), format_bytes(plan.lower_bound), plan.seconds,
        )  # fmt: skip

    # ---- from plan to step

    def _arm(self, plan: ArenaPlan) -> bool:
        if plan is self._armed:
            return True
        try:
            enable(self._allocator, plan)
        except AllocatorPlanError as error:
            self._stop(str(error))
            self._note(f"memory is left to PyTorch's allocator: {error}")
            return False
        self._armed = plan
        return True

    def _judge(self, kind: _Kind, plan: ArenaPlan) -> None:
        found = self._allocator.statistics(self._device)
        if found.given_back != self._given_back:
            reason = "memory ran out beside the arena, which was given back: the budget leaves no room for both"
            self._stop(reason)
            self._note(reason)
            return
        last = found.last_step
        self._served = last, plan
        wanted = LEAST_SHARE * plan.planned_bytes / plan.step_bytes * last.bytes
        kind.weak = kind.weak + 1 if last.served_bytes < wanted else 0
        if kind.weak < MOST_WEAK:
            return
        kind.plan, kind.seen, kind.weak = None, SETTLING, 0
        share = 100 * last.served_bytes / max(1, last.bytes)
        if kind.tries >= MOST_TRIES:
            self._note(
                f"steps differ from each other: {share:.0f} % of the bytes of the last one were where they were "
                f"planned, after {kind.tries} recordings; steps of this kind are left to PyTorch's allocator"
            )
        else:
            logger.info("memo: steps have changed (%.0f %% served by plan): one is recorded again", share)

    def _stop(self, reason: str) -> None:
        self._off, self._armed = reason, None
        self._allocator.disarm(self._device)

    # ---- what the user sees

    def report(self) -> ArenaReport:
        """What the latest planned step got."""
        found = self._allocator.statistics(self._device)
        plans = sum(kind.plan is not None for kind in self._kinds.values())
        counts, plan = self._served or (None, None)
        if counts is None or plan is None:
            state = self._off or ("no step was served yet" if plans == 0 else "planned, no step was served yet")
            return ArenaReport(state=state, plans=plans, arena_bytes=found.arena_bytes)
        return ArenaReport(
            state=self._off or "planned",
            plans=plans,
            arena_bytes=found.arena_bytes,
            planned_peak=plan.size,
            lower_bound=plan.lower_bound,
            requests=counts.requests,
            served=counts.served,
            bytes=counts.bytes,
            served_bytes=counts.served_bytes,
            misses=tuple((name, getattr(counts, name)) for name in _MISSES if getattr(counts, name)),
            reserved_bytes=torch.cuda.memory_reserved(self._device),
        )
