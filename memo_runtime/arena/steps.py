"""Steps of one model, planned by themselves: which are recorded, when a plan is there, which are served by it.

    kind of step   1st, 2nd    3rd         4th ...             from then on
                   as it is    recorded    solved meanwhile    served by plan

A kind is whatever makes a step ask for other requests. Steps of a kind may have different lengths: where two recorded
ones are the same program, one placement serves all lengths up to its own (``arena.lengths``), and a longer step than
that only makes a new one, of the same recordings; elsewhere every length is recorded and placed by itself. All kinds
share one arena. Steps of which too little was served are a sign that the plan is old: after a few of them the next is
recorded again, except where what they asked for has become known: then the same recordings are placed once more.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from memo_runtime.allocator.library import Counts, PlannedAllocator
from memo_runtime.arena.lengths import Pair, Sample, longest_of_bucket, pair_of
from memo_runtime.arena.placing import Placement
from memo_runtime.arena.plan import ArenaPlan, allowed_bytes, by_size, enable
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
#: How often a pair of recordings is placed again since requests had no room.
_MOST_GROWN = 8
#: Kinds that are remembered; a run may have a new length at every step.
MOST_KINDS = 16
#: Share of the device's memory that a step may need at least and is still tried without a plan: PyTorch's allocator
#: takes up to a quarter more than what lives, and lengths that vary make it worse.
_ROOMY = 0.7
#: Above this share there is no room for steps longer than any so far.
_TIGHT = 0.95
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
    """What is known of one kind of step.

    Attributes:
        seen: steps. lengths: steps of each length. tries: recordings of each length. weak: steps in a row that got too
            little. longest: tokens of the longest step. unlike: pairs whose other lengths were other programs. grown:
            times that the pair was placed again since requests had no room.
        samples: recorded steps. placements: those that have addresses.
    """

    seen: int = 0
    weak: int = 0
    unlike: int = 0
    grown: int = 0
    longest: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    tries: Counter[int] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)

    def placement(self, tokens: int) -> Placement | None:
        """The one that serves steps of ``tokens``."""
        return next((placement for placement in self.placements if placement.serves(tokens)), None)

    def forget(self, placement: Placement) -> None:
        """Its recordings are old."""
        self.placements.remove(placement)
        self.unlike += placement.pair is not None
        # A pair is of the kind as it was: so are the others.
        self.samples = [one for one in self.samples if placement.pair is None and one is not placement.sample]
        self.weak = self.grown = 0


@dataclass(frozen=True, slots=True)
class _Job:
    """What is being solved: steps of ``tokens``."""

    kind: _Kind
    tokens: int
    sample: Sample
    pair: Pair | None
    solving: Solving


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
        long_lived: weights, optimizer states and the like, which are moved together before the arena is made.
        known: placements of earlier runs, by kind. on_placed: is told when there is a new one.
    """

    def __init__(
        self,
        allocator: PlannedAllocator,
        device: int,
        note: Callable[[str], None],
        *,
        long_lived: Callable[[], Iterable[torch.Tensor]] = tuple,
        known: Mapping[Any, Sequence[Placement]] | None = None,
        on_placed: Callable[[], None] = lambda: None,
        recorder: Callable[[int], Recorder] = _recorder,
        solver: Callable[..., Solving] = Solving,
    ) -> None:
        self._allocator = allocator
        self._device = device
        self._note = note
        self._long_lived = long_lived
        self._make_recorder = recorder
        self._solver = solver
        self._on_placed = on_placed
        self._kinds: dict[Hashable, _Kind] = {
            key: _Kind(placements=list(placements)) for key, placements in (known or {}).items()
        }
        self._current: tuple[_Kind, int] | None = None
        self._serving: Placement | None = None
        self._armed: ArenaPlan | None = None
        self._recording: Recorder | None = None
        self._solving: _Job | None = None
        self._served: tuple[Counts, ArenaPlan] | None = None
        #: PyTorch's allocator keeps what it served for want of room, which the next placement has.
        self._spare = False
        #: The latest step had no plan.
        self._missed = True
        self._given_back = allocator.statistics(device).given_back
        #: The arena was given back outside of planned steps before.
        self._returned = False
        #: Why nothing is planned any more.
        self._off = ""
        self.closed = False
        _owners[device] = self

    # ---- steps

    def begin(self, key: Hashable, tokens: int = 0, batch: Iterable[torch.Tensor] = ()) -> None:
        """A step of kind ``key`` and ``tokens`` begins, and the one before is over.

        ``batch`` is what lives for this step and was made before it: moved together with what lives longer, where the
        arena is made now, since the next batch would take the place of this one among free memory again.
        """
        self.end()
        if self._off:
            return
        self._make_again()
        self._collect()
        kind = self._kinds.pop(key, None) or _Kind()
        self._kinds[key] = kind  # the latest is last
        if len(self._kinds) > MOST_KINDS:
            self._kinds.pop(next(iter(self._kinds)))
        self._current = kind, tokens
        kind.seen += 1
        kind.lengths[tokens] += 1
        kind.longest = max(kind.longest, tokens)
        placement = kind.placement(tokens) or self._place_longer(kind, tokens)
        self._missed = placement is None
        if placement is not None:
            if self._arm(placement, tokens, batch):
                self._serving = placement
                self._allocator.begin_step(self._device)
        elif self._wants_recording(kind, tokens):
            self._record()

    def end(self) -> None:
        """The step is over: what follows, such as an evaluation, is none of its."""
        current, self._current = self._current, None
        if current is None:
            return
        kind, tokens = current
        serving, self._serving = self._serving, None
        if self._recording is not None:
            self._solve(kind, tokens)
        elif serving is not None and self._armed is not None:
            self._allocator.end_step(self._device)
            self._judge(kind, tokens, serving, self._armed)

    def close(self) -> None:
        """Plan nothing any more; the arena goes back once nothing lives in it."""
        self._current, self.closed = None, True
        if self._recording is not None:
            self._recording.__exit__(None, None, None)
            self._recording = None
        if self._solving is not None:
            self._solving.solving.close()
            self._solving = None
        self._stop("closed")

    def wait(self) -> None:
        """Until what is being solved is there."""
        if self._solving is not None:
            self._solving.solving.wait()
            self._collect()

    # ---- from step to plan

    @property
    def _idle(self) -> bool:
        return self._recording is None and self._solving is None

    def _wants_recording(self, kind: _Kind, tokens: int) -> bool:
        # Lengths that turned out to be programs of their own are recorded only where they come back.
        strange = len(kind.samples) >= MOST_TRIES and kind.lengths[tokens] <= SETTLING
        if not self._idle or strange or kind.seen <= SETTLING or kind.tries[tokens] >= MOST_TRIES:
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

    def _solve(self, kind: _Kind, tokens: int) -> None:
        recorder, self._recording = self._recording, None
        assert recorder is not None, "a step was recorded"
        recorder.end(Phase.STEP)
        recorder.__exit__(None, None, None)
        kind.tries[tokens] += 1
        try:
            sample = Sample(tokens=tokens, trace=recorder.trace(), handles=recorder.stream_handles)
        except TraceError as error:
            self._note(f"a step could not be recorded to plan its memory: {error}")
            return
        pairs = (pair_of(sample, other) for other in kind.samples if kind.unlike < MOST_TRIES)
        pair = next((pair for pair in pairs if pair is not None), None)
        kind.samples = [*kind.samples[-MOST_KINDS:], sample]
        self._place(kind, sample, pair)

    def _place(self, kind: _Kind, sample: Sample, pair: Pair | None) -> None:
        """Find addresses: for the longest step so far where ``pair`` says what that asks for, else for ``sample``."""
        tokens = sample.tokens
        if pair is not None:
            sample, tokens = pair.long, longest_of_bucket(kind.longest)
            if _most_bytes(pair.at(tokens)) > _TIGHT * allowed_bytes(self._device):
                tokens = kind.longest  # which may just fit
        trace = sample.trace if pair is None else pair.at(tokens)
        self._solving = _Job(kind, tokens, sample, pair, self._solver(by_size(trace), seconds=_SOLVER_SECONDS))

    def _place_longer(self, kind: _Kind, tokens: int) -> Placement | None:
        """A step longer than those that are placed: addresses from their recordings.

        Found while it runs natively, except where it might run out of memory so: then it waits, as long as the solver
        takes at most.
        """
        pair = next((one.pair for one in reversed(kind.placements) if one.pair is not None), None)
        if pair is None:
            return None
        if self._idle:
            self._place(kind, pair.long, pair)
        if _most_bytes(pair.at(tokens)) < _ROOMY * allowed_bytes(self._device):
            return None
        for _ in range(2):  # something else may be under way
            self.wait()
            if kind.placement(tokens) is None and self._idle:
                self._place(kind, pair.long, pair)
        return kind.placement(tokens)

    def _collect(self) -> None:
        job = self._solving
        if job is None or not job.solving.done:
            return
        self._solving = None
        try:
            placement = Placement(job.tokens, job.sample, job.pair, job.solving.result())
            plan = placement.plan(job.tokens, self._device)
        except AllocatorPlanError as error:
            self._note(f"no memory is planned for some steps: {error}")
            return
        kind = job.kind
        if job.pair is not None:  # it serves all lengths that they served
            kind.placements = [one for one in kind.placements if not placement.serves(one.tokens)]
        kind.placements = [*kind.placements[-MOST_KINDS:], placement]
        kind.weak = 0
        if self._spare:
            self._spare = False
            torch.cuda.empty_cache()
        logger.info(
            "memo: %d requests of a step placed in an arena of %s (at least %s) in %.1f s",
            len(plan.rows), format_bytes(plan.size), format_bytes(plan.lower_bound), plan.seconds,
        )  # fmt: skip
        self._on_placed()

    # ---- from plan to step

    def _arm(self, placement: Placement, tokens: int, batch: Iterable[torch.Tensor]) -> bool:
        try:
            plan = placement.plan(tokens, self._device)
            if plan is self._armed:
                return True
            enable(self._allocator, plan, lambda: itertools.chain(self._long_lived(), batch))
        except AllocatorPlanError as error:
            self._stop(str(error))
            self._note(f"memory is left to PyTorch's allocator: {error}")
            return False
        self._armed = plan
        return True

    def _make_again(self) -> None:
        """What no plan served, such as an evaluation, needed the memory of the arena: it is over by now."""
        if self._armed is None:
            return
        given_back = self._allocator.statistics(self._device).given_back
        if given_back == self._given_back:
            return
        self._given_back, self._armed = given_back, None
        if not self._returned:
            self._note(
                "memory ran out outside of planned steps: the arena was given back, and is made again for the next one"
            )
        self._returned = True

    def _judge(self, kind: _Kind, tokens: int, placement: Placement, plan: ArenaPlan) -> None:
        found = self._allocator.statistics(self._device)
        if found.given_back != self._given_back:
            reason = "memory ran out beside the arena, which was given back: the budget leaves no room for both"
            self._stop(reason)
            self._note(reason)
            return
        last = found.last_step
        self._served = last, plan
        coming = self._learn(kind, tokens, placement, plan, last)
        wanted = LEAST_SHARE * plan.planned_bytes / plan.step_bytes * last.bytes
        kind.weak = kind.weak + 1 if last.served_bytes + coming < wanted else 0
        if kind.weak < MOST_WEAK:
            return
        kind.forget(placement)
        kind.seen = SETTLING
        share = 100 * last.served_bytes / max(1, last.bytes)
        if kind.tries[tokens] >= MOST_TRIES:
            self._note(
                f"steps differ from each other: {share:.0f} % of the bytes of the last one were where they were "
                f"planned, after {kind.tries[tokens]} recordings; steps of this kind are left to PyTorch's allocator"
            )
        else:
            logger.info("memo: steps have changed (%.0f %% served by plan): one is recorded again", share)

    def _learn(self, kind: _Kind, tokens: int, placement: Placement, plan: ArenaPlan, last: Counts) -> int:
        """What the step says of sizes at other lengths. Returns the bytes for which room is being made."""
        if placement.pair is None:
            return 0
        without_room = placement.learn(tokens, plan, self._allocator.misfits(self._device), last)
        if without_room and self._idle and kind.grown < _MOST_GROWN:
            kind.grown += 1
            self._spare = True
            self._place(kind, placement.sample, placement.pair)
        job = self._solving
        return without_room if job is not None and job.pair is placement.pair else 0

    def _stop(self, reason: str) -> None:
        self._off, self._armed = reason, None
        self._allocator.disarm(self._device)

    # ---- what the user sees, and the next run

    def placements(self) -> dict[Hashable, tuple[Placement, ...]]:
        """Those of each kind that has some."""
        return {key: tuple(kind.placements) for key, kind in self._kinds.items() if kind.placements}

    def report(self) -> ArenaReport:
        """What the latest planned step got."""
        found = self._allocator.statistics(self._device)
        plans = sum(len(kind.placements) for kind in self._kinds.values())
        counts, plan = self._served or (None, None)
        if counts is None or plan is None:
            state = self._off or ("no step was served yet" if plans == 0 else "planned, no step was served yet")
            return ArenaReport(state=state, plans=plans, arena_bytes=found.arena_bytes)
        return ArenaReport(
            state=self._off or ("planned" if not self._missed else "planned, but not the latest step: it has no plan"),
            plans=plans,
            arena_bytes=found.arena_bytes,
            planned_peak=plan.size,
            lower_bound=plan.lower_bound,
            resident_bytes=plan.resident_bytes,
            requests=counts.requests,
            served=counts.served,
            bytes=counts.bytes,
            served_bytes=counts.served_bytes,
            misses=tuple((name, getattr(counts, name)) for name in _MISSES if getattr(counts, name)),
            reserved_bytes=torch.cuda.memory_reserved(self._device),
        )


def _most_bytes(trace: Trace) -> int:
    """The most that is alive at once, each request rounded as the allocator does."""
    changes = [0] * (trace.ticks + 1)
    for request in trace.requests:
        size = -(-request.size // 512) * 512
        changes[request.lower] += size
        changes[request.upper] -= size
    return max(itertools.accumulate(changes))
