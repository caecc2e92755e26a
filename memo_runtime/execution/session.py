"""One wrapped model: its plan, its tools, and the step that is under way.

The session is the only place that knows the order of blocks. Streams and lifetimes:

* a block's copies to the host start at its ``commit`` and are released (compute waits, sources are freed) when the
  next block but one enters, so the skeletal tensors of two blocks are alive at a time: MEMO's two rounding buffers;
* in backward, the first tensor asked of a block fetches it, and the fetch of the block below starts then or when there
  is room for it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.real_kernels import RealKernels
from memo_runtime.blocks.undo import Surroundings
from memo_runtime.config import OnRefusal
from memo_runtime.errors import ReplayMismatchError
from memo_runtime.execution.batch import Outgoing
from memo_runtime.execution.block import BlockForward
from memo_runtime.execution.counters import BlockCounters, Clock, StepCounters
from memo_runtime.execution.guard import refuse_active_hooks, refuse_backward
from memo_runtime.execution.install import install_forward, remove_forward
from memo_runtime.execution.layout import Sorted
from memo_runtime.execution.membership import Members
from memo_runtime.execution.peak import PeakWatch, device_peak
from memo_runtime.execution.ranges import named
from memo_runtime.execution.stash import Stash, Tools
from memo_runtime.execution.telling import Telling
from memo_runtime.execution.tiled_block import new_programs
from memo_runtime.execution.tiled_cache import ProgramCache
from memo_runtime.execution.tiled_products import Departures
from memo_runtime.execution.tiled_swap import Entry
from memo_runtime.execution.turn import Turn
from memo_runtime.records import (
    BlockPlan,
    BlockProfile,
    Demotion,
    Forecast,
    Plan,
    TiledProfile,
)
from memo_runtime.reports import Report, Totals

Observer = Callable[[BlockForward, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_NO_PLAN = (
    "a part of the wrapped model was called by itself, and the model never, so there is no plan yet. Would work: call "
    "the model once, or wrap that part"
)
_NOT_SEEN = "it was not called when the model was profiled (layer drop, a branch not taken)"


class Session(Telling):
    """The runtime state of one wrapped model.

    After an exception in a step, including an interrupt, the next step starts clean: what the abandoned graph held
    goes back when the graph is freed, and ``begin`` forgets the rest. Somebody may keep that graph (a notebook keeps
    the last traceback, with all that its frames hold): its host memory is taken back when it is needed.

    Args:
        blocks: (qualified name, module) in call order.
        policy: what the user asked for, for the report. strict: a rerun that is found wrong stays an error.
        on_refusal: whether ``adopt`` keeps what host memory there is when the system refuses the rest.
    """

    def __init__(
        self,
        blocks: list[tuple[str, nn.Module]],
        policy: str,
        *,
        strict: bool = False,
        on_refusal: OnRefusal = OnRefusal.STOP,
    ) -> None:
        super().__init__(strict=strict)
        self.policy = policy
        self._on_refusal = on_refusal
        #: What reruns have shown, by block; plans made from now on take it into account.
        self.demotions: dict[str, Demotion] = {}
        #: Blocks that were called and that the plan does not have; whoever plans next takes note of them.
        self.strangers: set[str] = set()
        #: (block, way) to whether a plan for such calls is in force now; asked before the first block runs.
        self.on_other_way: weakref.WeakMethod[Callable[[str, str], bool]] | None = None
        self.blocks = [BlockForward(self, module, name, i) for i, (name, module) in enumerate(blocks)]
        self._members: Members | None = None
        self._turn = Turn()
        self._here = threading.local()
        self._preparing = False
        self.idle = False
        self.plan: Plan | None = None
        #: The plan was not made for the batches of this run.
        self.has_given_plan = False
        self.steps = 0
        self._decisions: dict[str, tuple[BlockProfile, BlockPlan]] = {}
        self._tools: Tools | None = None
        self._step: StepCounters | None = None
        #: A ``Stash``, or a ``tiled_swap.Entry``.
        self.last_stash: weakref.ref[Any] | None = None
        #: What the calls of this step have in host memory, and those of steps that an exception ended.
        self._stored: list[weakref.ref[Any]] = []
        self._given_up: list[weakref.ref[Any]] = []
        self._in_flight: deque[tuple[int, Callable[[], Outgoing | Entry | None]]] = deque()
        #: Products of tiles under way to the host.
        self.departures = Departures()
        self._programs: ProgramCache | None = None
        self.tiled_profiles: dict[tuple[str, int], TiledProfile] = {}
        self._witnessed: set[tuple[str, int, int, str]] = set()
        self._ready: deque[weakref.ref[Stash]] = deque()
        self._peak = PeakWatch()

    @property
    def observer(self) -> Observer | None:
        """What stands in for the blocks' forwards on this thread while it profiles; other threads have none."""
        observer: Observer | None = getattr(self._here, "observer", None)
        return observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        """Set it for this thread."""
        self._here.observer = observer

    # ---- in place

    def install(self, model: nn.Module) -> None:
        """Replace the forwards of the blocks, which are in ``model``."""
        self._members = Members(model, [(block.name, block.block) for block in self.blocks])
        for block in self.blocks:
            install_forward(block.block, block)

    def remove(self) -> None:
        """Restore the blocks' forwards and give host memory back. Graphs that are alive can still go backward."""
        for block in self.blocks:
            remove_forward(block.block)
        self._release_copies()
        if self._tools is not None:
            self._tools.pool.trim()

    # ---- plan

    def adopt(self, plan: Plan, device: torch.device) -> None:
        """Execute ``plan`` from the next block on; its host memory is reserved now.

        Raises:
            HostLimitError: the host memory cannot be had; the plan before stays in force.
            PinningError: the same, because the system refuses it; ``granted`` says what there is where that is kept.
        """
        if self._tools is None or self._tools.device != device or self._tools.process != os.getpid():
            self._tools = Tools(device, plan.limits.host_bytes, on_refusal=self._on_refusal)
            self._tools.pool.when_short = weakref.WeakMethod(self._take_back)
        self._tools.pool.limit = plan.limits.host_bytes
        self._tools.pool.fit(plan.forecast.host_bytes)
        self.plan = plan
        self._decisions = {
            block.name: (profile, block) for profile, block in zip(plan.profile.blocks, plan.blocks, strict=True)
        }

    def decision(self, name: str) -> tuple[BlockProfile | None, BlockPlan | None]:
        """Profile and plan of block ``name``; None before there is a plan."""
        return self._decisions.get(name, (None, None))

    def adopts_other_way(self, name: str, way: str) -> bool:
        """Block ``name`` is called in another ``way`` than it was planned for: a plan for that is adopted, or not."""
        found = self.on_other_way() if self.on_other_way is not None else None
        return found is not None and found(name, way)

    def below(self, name: str) -> str:
        """The block that is planned before ``name``; empty if there is none."""
        names = list(self._decisions)
        return names[names.index(name) - 1] if name in names[1:] else ""

    @property
    def no_plan_reason(self) -> str:
        """Why a block has no decision."""
        return _NO_PLAN if self.plan is None else _NOT_SEEN

    @property
    def tools(self) -> Tools:
        """Pool, copies and ledger of the device."""
        if self._tools is None:
            device = next((p.device for b in self.blocks for p in b.block.parameters()), torch.device("cpu"))
            self._tools = Tools(device, 0, on_refusal=self._on_refusal)
            self._tools.pool.when_short = weakref.WeakMethod(self._take_back)
        return self._tools

    @property
    def programs(self) -> ProgramCache:
        """Programs of tiles, shared by the blocks."""
        if self._programs is None:
            self._programs = new_programs(self.tools.device)
        return self._programs

    # ---- step

    @property
    def step(self) -> StepCounters:
        """The step under way."""
        if self._step is None:
            self.begin()
        assert self._step is not None, "begin makes a step"
        return self._step

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Profiling, planning and what else goes before a step, of the calling thread alone.

        Raises:
            MemoError: another thread is in the middle of its step.
        """
        self._turn.take(self.under_way)
        outermost = not self._preparing
        self._preparing = True
        surroundings = Surroundings()
        try:
            with RealKernels():
                yield
        except BaseException:
            surroundings.restore()
            raise
        finally:
            if outermost:
                self._preparing = False

    @contextlib.contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Steps inside are none of the training's: the last one that counts stays the one before.

        A comparison that a stand-in has passed is made again. A step that an exception ended is remembered, since the
        next one takes back what it holds.
        """
        step, steps, witnessed = self._step, self.steps, set(self._witnessed)
        try:
            yield
        finally:
            self.steps, self._witnessed = steps, witnessed
            if self._step is not None and not (self._step.failed or self._step.in_backward):
                self._step = step

    def under_way(self) -> bool:
        """A step was started and is not over."""
        step = self._step
        if self._preparing or (step is not None and step.in_backward):
            return True
        alive = self.last_stash is not None and self.last_stash() is not None
        return step is not None and not step.backward_seen and (step.in_forward or alive)

    def begin(self) -> None:
        """A new forward pass starts: nothing of an earlier one is in order before it."""
        if self._members is not None:
            self._members.look(self)
        if self._tools is not None and self._tools.process != os.getpid():
            device, self._tools = self._tools.device, None
            if self.plan is not None:
                self.adopt(self.plan, device)
        last = self._step
        if last is not None and (last.failed or last.in_backward):
            self._given_up = [one for one in (*self._given_up, *self._stored) if one() is not None]
        self._stored = []
        self.other_batch = ""
        self._tell_of_idleness()
        self._step = StepCounters(Clock(self.tools.device))
        self.steps += 1
        self.last_stash = None
        self._release_copies()
        self.tools.ledger.reset_peak()
        self._peak.begin(self.tools.device)

    def begin_if_new(self) -> None:
        """Begin a step unless this forward follows another whose backward is still to come."""
        step = self._step
        alive = self.last_stash is not None and self.last_stash() is not None
        if step is None or step.backward_seen or step.failed or (step.blocks and not alive):
            self.begin()

    def enter(self, block: BlockForward) -> BlockCounters:
        """Block ``block`` starts its forward."""
        self._turn.take(self.under_way)
        refuse_backward(block.name)
        if block.position == 0:
            self.begin_if_new()
        refuse_active_hooks()
        self._release_copies(before=block.position - 1)
        self.step.in_forward = True
        return self.step.block(block.name)

    def leave(self, block: BlockForward) -> None:
        """Block ``block`` has finished its forward; behind the last one nothing hides the copies any more."""
        if block.position == len(self.blocks) - 1:
            self._release_copies()
            self.step.in_forward = False
            self.caches.forward_ended()

    def pass_by(self) -> None:
        """A block runs without gradients."""
        if self._step is not None and not self._step.evaluated:
            self._step.passed_by = True

    def evaluates(self) -> None:
        """The model's forward has no gradients: what its blocks do is no part of a step."""
        if self._step is not None:
            self._step.evaluated = True

    def give_up(self) -> None:
        """A block's forward raised."""
        step = self.step
        step.failed, step.in_forward = True, False
        self.caches.forward_ended()

    def _take_back(self) -> bool:
        """Free the host memory of steps that an exception ended; False if there was none."""
        given_up, self._given_up = self._given_up, []
        stored = [found for one in given_up if (found := one()) is not None]
        for one in stored:
            one.give_back()
        return bool(stored)

    def commit(self, stash: Stash, sorted_: Sorted, position: int) -> None:
        """Block number ``position`` has finished its forward: start its copies."""
        with named(f"memo::offload {stash.name}"):
            outgoing = stash.send(sorted_.outgoing)
        stash.settle()
        stash.lower = self.last_stash
        stash.before_backward = partial(self._before_backward, step=self.step)
        stash.on_mismatch = self._demote
        # The stash owns its copies: where the graph is given up, nobody waits for them.
        self.follow(weakref.ref(stash), position, weakref.ref(outgoing))

    def follow(
        self, stash: weakref.ref[Any], position: int, outgoing: Callable[[], Outgoing | Entry | None]
    ) -> None:
        """``stash`` of block number ``position`` is the last one now; ``outgoing`` has the sources of its copies."""
        self.last_stash = stash
        self._stored.append(stash)
        self._in_flight.append((position, outgoing))
        self.step.clock.touch()

    def _release_copies(self, before: int | None = None) -> None:
        """Let compute wait for the copies of blocks below position ``before`` (None: of all) and free their sources."""
        while self._in_flight and (before is None or self._in_flight[0][0] < before):
            outgoing = self._in_flight.popleft()[1]()
            if outgoing is not None:
                outgoing.sent()

    def before_backward(self, step: StepCounters) -> None:
        """A block of ``step`` is about to go backward: nothing hides copies to the host any more."""
        self.backward_started(step)
        self._release_copies()

    def _before_backward(self, stash: Stash, step: StepCounters) -> None:
        self.before_backward(step)
        # The two most recent stay: autograd may go back and forth between neighbours.
        self._ready.append(weakref.ref(stash))
        while len(self._ready) > 2:
            older = self._ready.popleft()()
            if older is not None and older is not stash:
                older.drop()

    def backward_started(self, step: StepCounters) -> None:
        """Something of ``step`` is going backward."""
        if step is not self._step:
            self._turn.keep(step.owner, self.under_way)
        step.backward_seen = True
        step.clock.touch()
        if torch._C._current_graph_task_id() != -1:
            step.in_backward = True
            # Called by the engine when this backward pass is over; the last touch is the end of the step.
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._end_backward, step))

    def _end_backward(self, step: StepCounters) -> None:
        """A backward pass through ``step`` is over; called once for each of its blocks."""
        if step.in_backward and step is self._step:
            exceeded = self._peak.end(self.tools.device, self.tools.ledger, self.plan)
            if exceeded:
                self.note(exceeded)
        step.end_backward()

    def asks_for_witness(self, name: str, plan: BlockPlan) -> bool:
        """Whether a rerun of this call is compared with its forward.

        Always on CPU, and for a block that was found wrong before. On CUDA a comparison waits for the device, so it is
        made the first time that a block runs under a plan.
        """
        if self.tools.device.type == "cpu" or name in self.demotions:
            return True
        profile, _ = self.decision(name)
        key = (name, plan.tokens, plan.prefix, profile.way if profile is not None else "")
        first = key not in self._witnessed
        self._witnessed.add(key)
        return first

    def _demote(self, stash: Stash, error: ReplayMismatchError) -> ReplayMismatchError:
        """A rerun made something else: from the next plan on the block and its equals are run in a safer way.

        Returns the error to raise, which says so. With ``strict`` nothing changes.
        """
        profile, _ = self.decision(stash.name)
        if self.strict or profile is None:
            return error
        kind = replace(profile, name="")
        equals = [name for name, (other, _) in self._decisions.items() if replace(other, name="") == kind]
        if stash.whole_rerun:
            reason = "run again as a whole it made something else than its forward, so nothing of it is run again"
            then = "what it saves is swapped whole"
        else:
            reason = "run again on its tokens it made something else than its forward, which a short crop did not show"
            then = "it is run again as a whole, with its input swapped"
        for name in equals:
            self.demotions[name] = Demotion(reason=reason, rerunnable=not stash.whole_rerun)
        others = f" (and in {len(equals) - 1} blocks like it)" if len(equals) > 1 else ""
        return ReplayMismatchError(
            f"{error}. This step is lost. From the next step on {then}{others}; strict=True leaves it at the error"
        )

    # ---- report

    def _tell_of_idleness(self) -> None:
        """Say once that all blocks of a step ran without gradients."""
        if self._step is not None and self._step.passed_by and not self._step.blocks:
            self.note_idleness()

    def report(self) -> Report:
        """What the last step did; see ``reports.Report``."""
        self._tell_of_idleness()
        step = self._step
        blocks = tuple(step.blocks[b.name].report() for b in self.blocks if b.name in step.blocks) if step else ()
        forecast = self.plan.forecast if self.plan is not None else Forecast()
        states = self.plan.profile.states if self.plan is not None else None
        tools = self.tools
        totals = Totals(
            bytes_to_host=sum(b.bytes_to_host for b in blocks),
            bytes_to_device=sum(b.bytes_to_device for b in blocks),
            bytes_kept=sum(b.bytes_kept for b in blocks),
            recomputed_flops=sum(b.recomputed_flops for b in blocks),
            peak_bytes=device_peak(tools.device, tools.ledger, self.plan),
            stash_peak_bytes=tools.ledger.peak,
            stash_bytes=tools.ledger.current,
            host_bytes=tools.pool.reserved,
            host_bytes_in_use=tools.pool.in_use,
            open_copies=tools.engine.open_copies,
            step_seconds=step.clock.seconds() if step else 0.0,
            steps=self.steps,
            forecast=forecast,
        )
        notes = (*self.notes, *(self.plan.notes if self.plan is not None else ()))
        return Report(
            policy=self.policy,
            blocks=blocks,
            totals=totals,
            states=states,
            notes=tuple(notes),
            copies=tools.backend.description,
        )
