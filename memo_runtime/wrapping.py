"""A wrapped model: where the three stages meet.

A hook before the model's forward notices a step, refuses what cannot work, profiles and plans for shapes that it has
not seen, and hands the plan to the session, which executes it in the blocks.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from memo_runtime.arena.lengths import length_of
from memo_runtime.arena.model import StepMemory
from memo_runtime.blocks.ambient import AutocastState
from memo_runtime.blocks.containers import leaves_of
from memo_runtime.blocks.final_norm import final_norm
from memo_runtime.blocks.members import have_gradients, modules_of, parameters_of
from memo_runtime.blocks.ranks import apart_from_other_ranks, forwards_meet
from memo_runtime.blocks.stack import BlockRef
from memo_runtime.config import Layout, Loss, OnRefusal, Policy, Settings
from memo_runtime.errors import PinningError, PlanInfeasibleError
from memo_runtime.execution.block import BlockForward
from memo_runtime.execution.guard import refuse_active_hooks, refuse_other_optimisers
from memo_runtime.execution.install import install_pre_hook, original_forward, place, remove_pre_hook, take_back
from memo_runtime.execution.norm import install_norm, remove_norm, run_as_planned
from memo_runtime.execution.session import Session
from memo_runtime.execution.tiled_block import Tiling, try_tiles_again
from memo_runtime.execution.transforms import refuse_transforms
from memo_runtime.gate import Gate
from memo_runtime.integrations import huggingface
from memo_runtime.integrations.attention_masks import MaskInstallation, install_masks
from memo_runtime.kinds import Kinds
from memo_runtime.planning.announcing import announce
from memo_runtime.planning.compare import check_fingerprint
from memo_runtime.planning.demotion import amended, plan_with
from memo_runtime.planning.executors import tiles_are_worth_trying
from memo_runtime.planning.sheet import Sheet, lengths_of
from memo_runtime.profiling.fingerprint import batch_signature, classes_of_libraries, make_fingerprint
from memo_runtime.profiling.later import Later
from memo_runtime.profiling.machine import device_memory
from memo_runtime.profiling.measured import Measured, cautious
from memo_runtime.profiling.model import model_device, profile_model
from memo_runtime.profiling.reading import Reading, Shapes, Sizes
from memo_runtime.profiling.walk import NamedBlock, Run
from memo_runtime.recent import Recent
from memo_runtime.records import Plan, Profile
from memo_runtime.units import format_seconds

logger = logging.getLogger("memo_runtime")

ATTRIBUTE = "_memo"
Batch = tuple[tuple[Any, ...], dict[str, Any]]

#: Plans, kinds of batches, and profiles of a kind that are remembered: a run may have a new length at every step.
_MOST_PLANS = 64
_MOST_KINDS = 32
_MOST_SHAPES = 7
#: How often a kind of batch is profiled anew for a block that came late, which need not come again.
_MOST_TRIES = 3
_GRANTED = "what the system gave of more"
_NO_TILES = (
    "auto did not try tiles, which another rank may not need: give policy='tiled' where parameters are sharded"
)
_ALONE = "a batch of a new kind or shape came while parameters are sharded, so it was not profiled"


@dataclass(slots=True, weakref_slot=True)
class Wrapped:
    """One wrapped model: settings, session, and the plans made so far."""

    model: nn.Module
    refs: Sequence[BlockRef]
    settings: Settings
    loss: Loss
    optimizer: torch.optim.Optimizer | None
    given_plan: Plan | None
    session: Session
    on_refusal: OnRefusal = OnRefusal.STOP
    layout: Layout = Layout.AUTO
    #: How often the model was profiled: once for every kind of batch, whatever its shapes.
    profiled: int = 0
    _plans: Recent[Plan] = field(default_factory=lambda: Recent(_MOST_PLANS))
    _accumulates: Recent[bool] = field(default_factory=lambda: Recent(_MOST_PLANS))
    _known: Recent[list[Reading]] = field(default_factory=lambda: Recent(_MOST_KINDS))
    #: By kind of batch, how often the profile was made for blocks that it lacked; and the kind of the step before.
    _tries: Recent[Counter[str]] = field(default_factory=lambda: Recent(_MOST_KINDS))
    _kind: tuple[Any, ...] | None = None
    #: Host bytes that the system gave when it refused the rest; every plan from then on is made for those.
    _granted: int | None = None
    _kinds: Kinds = field(init=False)
    #: The step under way starts with gradients.
    _accumulating: bool = False
    _handle: Any = None
    _integration: Any = None
    _masks: MaskInstallation | None = None
    _norm: nn.Module | None = None
    #: Places the memory of steps, for ``layout='planned'``.
    memory: StepMemory | None = None

    def __post_init__(self) -> None:
        self._kinds = Kinds(self.model, self._known)
        self.session.on_other_way = weakref.WeakMethod(self._called_otherwise)

    def __str__(self) -> str:
        asked, given = self.settings, self.given_plan
        named = [f"policy '{asked.policy}'" if given is None else f"a plan of policy '{given.policy}'"]
        knobs = {name: getattr(asked, name) for name in ("alpha", "budget", "host_budget", "keep_last", "tile")}
        named += [f"{name}={value}" for name, value in knobs.items() if value is not None]
        named += ["strict=True"] if asked.strict else []
        named += [f"layout='{self.memory or self.layout}'"] if self.layout != Layout.AUTO else []
        named += [f"loss='{self.loss}'"] if self.loss != Loss.AUTO else []
        named += [f"on_refusal='{self.on_refusal}'"] if self.on_refusal != OnRefusal.STOP else []
        return ", ".join([*named, f"{len(self.refs)} blocks"])

    # ---- in place

    def install(self) -> None:
        """Put everything in place; on an error nothing stays."""
        self._integration = huggingface.install(self.model, loss=self.loss)
        try:
            if not self.session.idle:
                self._masks = install_masks(self.model)
                norm = final_norm(self.model, [ref.name for ref in self.refs])
                self._norm = norm if norm is not None and install_norm(norm) else None
            self.session.install(self.model)
            self._handle = install_pre_hook(self.model, Gate(self.before_forward))
            place(self.model, ATTRIBUTE, self)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore the model."""
        take_back(self.model, ATTRIBUTE)
        if self._handle is not None:
            remove_pre_hook(self.model, self._handle)
        self.session.remove()
        if self.memory is not None:
            self.memory.close()
        if self._integration is not None:
            self._integration.remove()
        if self._masks is not None:
            self._masks.remove()
        if self._norm is not None:
            remove_norm(self._norm)

    @property
    def _tiles_loss(self) -> bool:
        return self._integration is not None and bool(getattr(self._integration, "tiles_loss", False))

    def same_as(self, other: Wrapped) -> bool:
        """Wrapped with the same settings, blocks and plan."""
        return (
            self.settings == other.settings
            and self.loss == other.loss
            and self.on_refusal == other.on_refusal
            and (self.layout, str(self.memory)) == (other.layout, str(other.memory))
            and self.given_plan == other.given_plan
            and [ref.name for ref in self.refs] == [ref.name for ref in other.refs]
        )

    # ---- step

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is about to run its forward."""
        if self.session.observer is None:
            self.session.caches.look_at(self.model, args, kwargs)
        if not torch.is_grad_enabled() or self.session.idle or self.session.observer is not None:
            self.session.evaluates()
            if self.memory is not None and self.session.observer is None and not self.session.under_way():
                self.memory.end()
            return
        try:
            with self.session.turn():
                self._ready_for(args, kwargs)
        except BaseException:
            self.session.caches.forward_ended()  # before it began
            raise

    def plan_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        """The plan of a step on this batch that starts without gradients; nothing is reserved for it yet.

        Raises:
            PlanInfeasibleError, HostLimitError: there is none.
        """
        device = model_device(self.model)
        with self.session.turn():
            key, shapes = self._signature(args, kwargs, device, parameters_of(modules_of(self.model)))
            return self._planned(key, shapes, (args, kwargs), device, accumulating=False)

    def _ready_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_transforms(type(self.model).__name__, args, kwargs)
        modules = modules_of(self.model)
        refuse_other_optimisers(modules, {id(ref.module) for ref in self.refs})
        refuse_active_hooks()
        device = model_device(self.model)
        parameters = parameters_of(modules)
        key, shapes = self._signature(args, kwargs, device, parameters)
        self._meet_strangers(key, shapes, (args, kwargs))
        try_tiles_again(self.session)
        found = self._found()
        accumulating = self._accumulates.get((key, shapes)) is not None or have_gradients(parameters)
        planned = partial(self._planned, key, shapes, (args, kwargs), device, accumulating=accumulating)
        plan = planned()
        if accumulating:
            # The fresh steps between keep that plan, which fits them too: plans do not change at every micro-batch.
            self._accumulates.put((key, shapes), True)
        if plan is not self.session.plan:
            self._adopt(plan, planned, device)
        self._accumulating = accumulating
        steps_before = self.session.steps
        self.session.begin_if_new()
        if self.memory is not None and self.session.steps != steps_before:
            tokens, others = length_of(shapes)
            given = [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            # Numbers of calls are given as they come, which may be another order in the next run.
            ways = tuple(sorted({block.way for block in plan.profile.blocks}))
            self.memory.begin((key[:-1], ways, others, found, accumulating), device, tokens, given)

    def _look(self, batch: Batch, known: Sequence[Measured]) -> Mapping[str, str] | None:
        return Later(self.model, self._named(), self._runner(batch), batch).ways(known)

    def _called_otherwise(self, name: str, way: str) -> bool:
        """Block ``name`` of the step under way is called in another way; True: a plan for such calls is adopted."""
        plan = self.session.plan
        if self.given_plan is not None or plan is None:
            return False
        # Behind the first one, blocks have run by the plan that is in force.
        key = self._kinds.called_otherwise(name, way, first=plan.blocks[0].name == name)
        known = self._kinds.profile(key) if key is not None else None
        if key is None or known is None:
            return False

        def planned() -> Plan:
            place = (key, self._kinds.shapes, self._found(), self._accumulating)
            plan = self._plans.get(place) or self._plan(*known, accumulating=self._accumulating)
            self._plans.put(place, plan)
            return plan

        self._adopt(planned(), planned, model_device(self.model))
        return True

    def _found(self) -> tuple[Any, ...]:
        """What reruns have shown so far: a plan made before one was found wrong is not used again."""
        return tuple(self.session.demotions.items())

    def _planned(
        self, key: tuple[Any, ...], shapes: Shapes, batch: Batch, device: torch.device, *, accumulating: bool
    ) -> Plan:
        place = (key, shapes, self._found(), accumulating)
        plan = self._plans.get(place)
        if plan is None:
            if self.memory is not None:
                self.memory.end()  # what is measured for a new plan is none of the step before
            plan = self._prepare(key, shapes, batch, device, accumulating=accumulating)
            self._plans.put(place, plan)
        return plan

    def _adopt(self, plan: Plan, again: Callable[[], Plan], device: torch.device) -> None:
        """Adopt ``plan``; where the system refuses its host memory and that was asked for, one for what it gave."""
        try:
            self.session.adopt(plan, device)
        except PinningError as error:
            if error.granted is None:
                raise
            self._granted, self._plans = error.granted, Recent(_MOST_PLANS)
            self.session.note(f"{error}: planned anew within that")
            try:
                plan = again()
            except PlanInfeasibleError as none_fits:
                raise type(none_fits)(f"{none_fits}\n  since      {error}") from error
            self.session.adopt(plan, device)
        if self._norm is not None:
            run_as_planned(self._norm, plan)
        announce(plan, self.session.note)

    def _meet_strangers(self, key: tuple[Any, ...], shapes: Shapes, batch: Batch) -> None:
        """The step before called blocks that its profile lacks: a batch of that kind is profiled with them."""
        same_kind, self._kind = key == self._kind, key
        strangers, self.session.strangers = self.session.strangers, set()
        tries = self._tries.get(key) or Counter()
        new = {name for name in strangers if tries[name] < _MOST_TRIES}
        # Of another kind, they are met again when two batches of that kind follow each other.
        if not new or not same_kind or self.given_plan is not None or forwards_meet(self.model):
            return
        tries.update(new)
        self._tries.put(key, tries)
        measured = self._measure(batch, before=self._measured_at(key, shapes))
        self._known.put(key, [Reading(measured, shapes)])
        self._plans = Recent(_MOST_PLANS)

    def _measured_at(self, key: tuple[Any, ...], shapes: Shapes) -> Measured | None:
        """What is known at ``shapes`` with the measured number of sequences."""
        for reading in self._known.get(key) or []:
            sizes = reading.sizes_of(shapes)
            if sizes is not None and not sizes.rows and reading.knows(sizes):
                return reading.measured.at_tokens(sizes.tokens)
        return None

    def _signature(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device, parameters: Sequence[nn.Parameter]
    ) -> tuple[tuple[Any, ...], Shapes]:
        leaves = leaves_of((args, kwargs))
        shapes = tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor))
        base = (
            batch_signature(args, kwargs),
            self.model.training,
            AutocastState.current(device.type).signature(),
            tuple((p.dtype, p.requires_grad) for p in parameters),
            str(device),
        )
        # Which calls of blocks such a batch makes is looked at where it is not known.
        may_look = self.given_plan is None and not forwards_meet(self.model)
        return self._kinds.key(base, shapes, (args, kwargs), self._look if may_look else None), shapes

    def _prepare(
        self, key: tuple[Any, ...], shapes: Shapes, batch: Batch, device: torch.device, *, accumulating: bool
    ) -> Plan:
        if self.given_plan is not None:
            self._check_given(batch, device)
            return amended(self.given_plan, self.session.demotions, accumulating=accumulating)
        readings = self._known.get(key) or []
        for number, reading in enumerate(readings):
            sizes = reading.sizes_of(shapes)
            if sizes is not None and not forwards_meet(self.model):
                reading = readings[number] = self._completed(reading, sizes, batch)
            if sizes is not None and reading.knows(sizes):
                plan, readings[number] = self._plan_or_try_tiles(reading, sizes, batch, accumulating=accumulating)
                return plan
        if self._known and forwards_meet(self.model):
            return self._plan_without_profiling(readings, shapes, accumulating=accumulating)
        plan, reading = self._plan_or_try_tiles(
            Reading(self._measure(batch), shapes), Sizes({}, {}), batch, accumulating=accumulating
        )
        self._known.put(key, [*readings[-_MOST_SHAPES:], reading])
        return plan

    def _plan_or_try_tiles(
        self, reading: Reading, sizes: Sizes, batch: Batch, *, accumulating: bool
    ) -> tuple[Plan, Reading]:
        """(the plan, ``reading`` with what was found out for it): ``auto`` tries tiles where that is worth it."""
        plan, refusal = None, None
        profile = reading.measured.at(sizes.rows, sizes.tokens)
        try:
            plan = self._plan(profile, sizes.tokens, accumulating=accumulating)
        except PlanInfeasibleError as error:
            # Its traceback would hold this frame, and so the batch, until the next garbage collection.
            refusal = error.with_traceback(None)
        profile, settings = self._asked(profile)
        sheet = Sheet(profile, lengths_of(profile, sizes.tokens), accumulating=accumulating)
        if tiles_are_worth_trying(sheet, settings, plan.forecast.step_seconds if plan is not None else None):
            if not forwards_meet(self.model):
                reading = self._with_tiles(reading, sizes, batch)
                profile = reading.measured.at(sizes.rows, sizes.tokens)
                return self._plan(profile, sizes.tokens, accumulating=accumulating), reading
            self.session.note(_NO_TILES)
        if plan is None:
            assert refusal is not None, "there is a plan or an error"
            raise refusal
        return plan, reading

    def _with_tiles(self, reading: Reading, sizes: Sizes, batch: Batch) -> Reading:
        """``reading`` with what its blocks take by tiles, seen in calls of ``batch``, which has other ``sizes``."""
        began = time.perf_counter()
        profile = reading.measured.at(sizes.rows, {})
        by_tiles = Tiling(known=profile)
        Later(self.model, self._named(), self._runner(batch, by_tiles), batch).call_blocks(reading.measured)
        logger.info("memo: blocks tried by tiles in %s", format_seconds(time.perf_counter() - began))
        measured = reading.measured.with_tiles_of(by_tiles.added_to(profile), sizes.rows)
        return replace(reading, measured=measured)

    def _asked(self, profile: Profile) -> tuple[Profile, Settings]:
        """What is planned from: ``profile`` and the settings, less the host memory that the system refused."""
        if self._granted is None:
            return profile, self.settings
        granted = replace(profile, host_bytes=self._granted, host_source=_GRANTED)
        return granted, replace(self.settings, host_budget=None)

    def _plan(self, profile: Profile, tokens: Mapping[int, int] | None = None, *, accumulating: bool) -> Plan:
        profile, settings = self._asked(profile)
        return plan_with(profile, settings, self.session.demotions, tokens=tokens, accumulating=accumulating)

    def _plan_without_profiling(self, readings: Sequence[Reading], shapes: Shapes, *, accumulating: bool) -> Plan:
        """A plan for a batch that nothing is known about, where profiling would wait for the other ranks.

        Every call finds its own sizes; what differs is the forecast, and how much is run again.
        """
        for reading in readings:
            sizes = reading.sizes_of(shapes)
            if sizes is not None:
                self.session.note(f"{_ALONE}; its bytes at this batch size are estimates")
                profile = reading.measured.at(sizes.rows, sizes.tokens)
                return self._plan(profile, sizes.tokens, accumulating=accumulating)
        if readings:
            self.session.note(f"{_ALONE}; its plan is that of another shape, stretched")
            return self._plan(readings[-1].measured.profile, accumulating=accumulating)
        self.session.note(f"{_ALONE}; in such steps every block is run again as a whole")
        latest = self._known.latest()
        assert latest is not None, "something was profiled"
        return self._plan(cautious(latest[-1].measured.profile), accumulating=accumulating)

    def _check_given(self, batch: Batch, device: torch.device) -> None:
        assert self.given_plan is not None, "there is a plan to check"
        names = [block.name for block in self.given_plan.profile.blocks]
        name, _ = device_memory(device)
        made = make_fingerprint(self.model, names, batch_signature(*batch), device.type, name)
        check_fingerprint(self.given_plan, made, classes_of_libraries({ref.name: ref.module for ref in self.refs}))

    def profile(self, batch: Batch, *, tiles: bool = False) -> Profile:
        """Measure the model on ``batch``; ``tiles``: also what its blocks take by tiles."""
        return self._measure(batch, tiles=tiles).profile

    def _measure(self, batch: Batch, *, before: Measured | None = None, tiles: bool = False) -> Measured:
        self.profiled += 1
        began = time.perf_counter()
        by_tiles = Tiling(self.settings.tile) if tiles or self.settings.policy is Policy.TILED else None
        measured = profile_model(
            self.model,
            self._named(),
            self._runner(batch, by_tiles),
            batch=batch,
            optimizer=self.optimizer,
            tiled_loss=self._tiles_loss and "labels" in batch[1],
            rows_at_once=forwards_meet(self.model),
            before=before,
        )
        logger.info("memo: %d blocks profiled in %s", len(self.refs), format_seconds(time.perf_counter() - began))
        return measured if by_tiles is None else measured.with_tiles_of(by_tiles.added_to(measured.profile), {})

    def _completed(self, reading: Reading, sizes: Sizes, batch: Batch) -> Reading:
        """``reading`` with what this batch shows of other numbers of sequences, or of other lengths of a pair.

        What blocks take by tiles is seen for each number: it is captured for that anyway.
        """
        measured, later = reading.measured, Later(self.model, self._named(), self._runner(batch), batch)
        if measured.left_for_later(sizes.rows):
            measured = later.with_rows(measured)
        if measured.pairs_left_for_later(sizes.rows, sizes.tokens):
            measured = later.with_pairs(measured, sizes.tokens)
        reading = reading if measured is reading.measured else replace(reading, measured=measured)
        if measured.tiles_left_for_later(sizes.rows) and reading.knows(sizes):
            reading = self._with_tiles(reading, sizes, batch)
        return reading

    def _named(self) -> list[NamedBlock]:
        return [NamedBlock(ref.name, ref.stack, ref.module, original_forward(ref.module)) for ref in self.refs]

    def _runner(self, batch: Batch, by_tiles: Tiling | None = None) -> Run:
        args, kwargs = batch

        def run(observer: Callable[..., Any]) -> None:
            def see(block: BlockForward, forward: Callable[..., Any], a: tuple[Any, ...], k: dict[str, Any]) -> Any:
                # The step would be refused here too; and under checkpoint a backward of the profile would come back.
                refuse_active_hooks()
                if by_tiles is None:
                    return observer(block.name, forward, a, k)
                output = observer(block.name, forward, a, k, first=partial(by_tiles.see, block, a, k))
                return by_tiles.made(block, output)

            self.session.observer = see
            try:
                with self.session.turn(), apart_from_other_ranks(self.model):
                    # With its hooks: FSDP gathers parameters in one, users change arguments in others.
                    self.model._call_impl(*args, **kwargs)
            finally:
                self.session.observer = None

        return run


def make_wrapped(
    model: nn.Module,
    refs: Sequence[BlockRef],
    settings: Settings,
    *,
    loss: Loss = Loss.AUTO,
    optimizer: torch.optim.Optimizer | None = None,
    plan: Plan | None = None,
    on_refusal: OnRefusal = OnRefusal.STOP,
    layout: Layout = Layout.AUTO,
) -> Wrapped:
    """A wrapped model, not installed yet."""
    policy = plan.policy if plan is not None else settings.policy.value
    named = [(ref.name, ref.module) for ref in refs]
    session = Session(named, policy, strict=(plan or settings).strict, on_refusal=on_refusal)
    session.has_given_plan = plan is not None
    session.idle = settings.policy == Policy.NONE and plan is None
    made = Wrapped(model, refs, settings, loss, optimizer, plan, session, on_refusal, layout)
    if layout is Layout.PLANNED:
        made.memory = StepMemory(model, optimizer, session.note)
    return made
