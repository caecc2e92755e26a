"""The forward that ``wrap`` puts in place of a block's own.

Without grad it is the block's own forward. With grad it runs that forward, unchanged, under hooks that see what
autograd saves, and sorts it into a stash when the forward is done.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from memo_runtime.blocks.ambient import AttentionState, AutocastState, BufferState, RandomState
from memo_runtime.blocks.cache import HOLDS_TOKENS
from memo_runtime.blocks.call import BlockCall, first_tensor, sequences_in
from memo_runtime.blocks.operators import pin_kind
from memo_runtime.blocks.pins import CaptureMode, PinKey
from memo_runtime.blocks.rerun import Forward, parameter_storages
from memo_runtime.blocks.state import StateWatch
from memo_runtime.blocks.undo import Surroundings
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution.caches import WANTED
from memo_runtime.execution.counters import BlockCounters
from memo_runtime.execution.forms import Forms
from memo_runtime.execution.install import original_forward
from memo_runtime.execution.layout import PlannedLayout, Sorted, StorageLayout
from memo_runtime.execution.ledger import Share
from memo_runtime.execution.otherwise import plan_for_way
from memo_runtime.execution.ranges import named
from memo_runtime.execution.replay import Rerun
from memo_runtime.execution.stash import Stash
from memo_runtime.execution.tiled_block import TiledForward, give_up_tiles
from memo_runtime.execution.witness import Witness
from memo_runtime.records import RESIDENT_ROLES, Action, BlockPlan, BlockProfile, Executor
from memo_runtime.sizes import stored_bytes

if TYPE_CHECKING:
    from memo_runtime.execution.session import Session

logger = logging.getLogger("memo_runtime")


_NOT_COMPILED = (
    "memo_runtime manages this block, and saved-tensor hooks are not traced: compile without fullgraph=True (graphs "
    "break around managed blocks), or compile the modules inside the blocks, or call memo.unwrap(model)"
)


def for_length(plan: BlockPlan, tokens: int) -> BlockPlan:
    """``plan`` for a call of another length: the same share of tokens is stashed."""
    if plan.tokens == tokens or not plan.tokens:
        return plan
    if plan.prefix >= plan.tokens:
        return replace(plan, tokens=tokens, prefix=tokens, device_rows=0)
    prefix = plan.prefix * tokens // plan.tokens
    device_rows = plan.device_rows * tokens // plan.tokens
    return replace(plan, tokens=tokens, prefix=max(prefix, 1 if plan.prefix else 0), device_rows=device_rows)


def _tokens_of(call: BlockCall, profile: BlockProfile | None) -> int:
    """Tokens of this call; 0 where the block's are not known."""
    if profile is None or not profile.tokens:
        return 0
    return int(call.leaves[profile.input_leaf].shape[profile.token_dim])


class BlockForward:
    """Callable that stands in for ``block.forward``; ``position`` is the block's place in call order."""

    def __init__(self, session: Session, block: nn.Module, name: str, position: int) -> None:
        self.session = session
        self.block = block
        self.name = name
        self.position = position
        self._layouts: dict[tuple[int, int], PlannedLayout] = {}
        self._watch = StateWatch(name, block)
        self.tiles = TiledForward(self)

    @torch.compiler.disable(reason=_NOT_COMPILED)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        forward = original_forward(self.block)
        if self.session.observer is not None:
            return self.session.observer(self, forward, args, kwargs)
        if not torch.is_grad_enabled() or self.session.idle:
            self.session.pass_by()
            return forward(*args, **kwargs)
        counters = self.session.enter(self)
        surroundings = Surroundings()
        try:
            return self._managed(counters, forward, args, kwargs)
        except BaseException:
            self.session.give_up()
            surroundings.restore()
            raise

    def _managed(
        self, counters: BlockCounters, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        session = self.session
        call = BlockCall.of(args, kwargs, self.block)
        session.note_squares(call)
        found, filled = call.caches()
        if filled or (found and session.caches.wants(call)):
            session.note_native(self.name, HOLDS_TOKENS if filled else WANTED)
            return self._left_alone(forward, args, kwargs)
        if found:
            session.note_cache_off(self.block, call)
        profile, plan = session.decision(self.name)
        foreseen = call.is_empty or profile is None or profile.way in ("", call.way())
        if not foreseen and profile is not None and plan is not None:
            profile, plan = plan_for_way(session, self.name, call, profile, plan)
        executor = plan.executor if plan is not None else Executor.NATIVE
        if call.is_empty:
            executor = Executor.NATIVE
            counters.reason = "its input is empty"
        else:
            if executor is not Executor.TILED:
                # Tiles run no code of the block, which would fill it.
                call = call.with_own_caches()
                args, kwargs = call.arguments()
            counters.reason = plan.reason if plan is not None else session.no_plan_reason
            if plan is None:
                session.strangers.add(self.name)
                if session.plan is None:
                    session.note_native(self.name, counters.reason)
        counters.executor = executor
        tokens = _tokens_of(call, profile)
        if plan is not None and tokens != plan.tokens and executor is not Executor.NATIVE:
            session.note_length(self.name, tokens, plan.tokens)
        if session.has_given_plan and profile is not None and tokens and not call.is_empty:
            self._look_at_rows(call, profile, tokens)
        if executor is Executor.TILED and plan is not None and profile is not None:
            try:
                output = self.tiles.run(call, profile, plan, counters)
                session.leave(self)
                return output
            except CaptureRefusedError as error:
                give_up_tiles(session, self, error)
                executor = Executor.NATIVE
                args, kwargs = call.arguments()
        if executor in (Executor.KEEP, Executor.NATIVE) or plan is None or profile is None:
            kept = self._kept(profile, tokens) if profile is not None and executor is Executor.KEEP else 0
            output = self._untouched(forward, args, kwargs, kept)
        else:
            counters.alpha = plan.alpha
            output = self._stashed(forward, call, profile, plan)
        session.leave(self)
        return output

    def _look_at_rows(self, call: BlockCall, profile: BlockProfile, tokens: int) -> None:
        """Where the plan's number of sequences was read: at its first block, before that runs."""
        plan, hidden = self.session.plan, call.leaves[profile.input_leaf]
        first = next((block.name for block in plan.profile.blocks if block.tokens), "") if plan is not None else ""
        if plan is not None and first == self.name and profile.token_dim < hidden.dim() - 1:
            self.session.note_rows(self.name, sequences_in(hidden, tokens), plan.profile.rows)

    def _left_alone(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = self._untouched(forward, args, kwargs, 0)
        self.session.leave(self)
        return output

    def _kept(self, profile: BlockProfile, tokens: int) -> int:
        """Bytes that stay on the device for a call that is left as it is, as profiled."""
        own = (group for group in profile.groups if group.saved and group.role not in RESIDENT_ROLES)
        return stored_bytes(own, tokens)

    def _untouched(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], kept: int) -> Any:
        """The block as it is; ``kept``: bytes of it that stay, as far as that is counted."""
        output = forward(*args, **kwargs)
        self.session.step.block(self.name).bytes_kept += kept
        tensor = first_tensor(output)
        if tensor is not None:
            # When its gradient arrives, this block's backward starts and the one below should be on its way.
            tensor.register_hook(_BackwardStarts(self.session, kept))
        return output

    def _stashed(self, forward: Forward, call: BlockCall, profile: BlockProfile, plan: BlockPlan) -> Any:
        session = self.session
        tokens = _tokens_of(call, profile)
        plan = for_length(plan, tokens)
        stash = Stash(self.name, session.tools, session.step.block(self.name))
        stash.whole_rerun = plan.executor == Executor.RECOMPUTE
        capture = self._capture(profile, plan)
        ambient = AutocastState.current(session.tools.device.type), AttentionState.current()
        random = RandomState.current(session.tools.device) if _needs_random(profile, plan) else None
        state = self._watch.take(call, draws=profile.draws) if _reruns(plan) else None
        buffers = BufferState.current(state.writable()) if profile.stateful and state is not None else None
        args, kwargs = call.arguments()
        versions = [tensor._version for _, tensor in call.tensors()]
        hooks = saved_tensors_hooks(stash.pack, stash.unpack)
        with named(f"memo::forward {self.name}"), hooks:
            if capture is None:
                output = forward(*args, **kwargs)
            else:
                with capture:
                    output = forward(*args, **kwargs)
        if stash.pending:
            captured = capture.captured if capture is not None else {}
            # A rerun from what the block itself changed in place would compute something else.
            written = state.written(buffers.tensors if buffers is not None else ()) if state is not None else ""
            if versions != [tensor._version for _, tensor in call.tensors()]:
                written = "an argument"
            sorted_ = self._sort(stash, call, profile, plan, captured, written=written)
            if not sorted_.complete:
                rerun = self._rerun(call, profile, plan, sorted_, count=len(stash.pending), ambient=ambient)
                rerun.random, rerun.buffers, rerun.inner_autograd = random, buffers, stash.walked
                rerun.written = frozenset(capture.written) if capture is not None else frozenset()
                rerun.begin_from(state)
                rerun.forms = Forms(self.name, stash.pending, prefix=rerun.prefix, tokens=rerun.tokens)
                if session.asks_for_witness(self.name, plan):
                    rerun.witness = self._witness(stash, profile, rerun)
                stash.rebuild = rerun
            session.commit(stash, sorted_, self.position)
        return output

    def _capture(self, profile: BlockProfile, plan: BlockPlan) -> CaptureMode | None:
        if plan.executor == Executor.RECOMPUTE or plan.prefix >= plan.tokens:
            return None
        if profile.dynamic:
            return CaptureMode(_wanted_by_name)
        wanted = self._planned(profile, plan).captures
        return CaptureMode(lambda key: wanted.get(key, ())) if wanted else None

    def _planned(self, profile: BlockProfile, plan: BlockPlan) -> PlannedLayout:
        key = (id(profile), hash(plan))
        if key not in self._layouts:
            self._layouts = {key: PlannedLayout(profile, plan)}
        return self._layouts[key]

    def _sort(
        self,
        stash: Stash,
        call: BlockCall,
        profile: BlockProfile,
        plan: BlockPlan,
        captured: Any,
        *,
        written: str,
    ) -> Sorted:
        whole = plan.executor == Executor.REPLAY and plan.prefix >= plan.tokens
        surprise = stash.walked and not profile.inner_autograd and not whole
        if surprise:
            self.session.note_inner_autograd(self.name)
        elif written and not whole:
            self.session.note_in_place(self.name, written)
        elif not profile.dynamic and plan.executor == Executor.REPLAY:
            layout = self._planned(profile, plan)
            found = layout.find(stash, call, captured)
            if found is not None:
                stash.hold_skeletal(layout.skeletal_bytes())
                return layout.sort(stash, call, captured, found)
            self.session.note_deviation(self.name)
        swap = whole or surprise or bool(written) or (plan.executor == Executor.REPLAY and not profile.dynamic)
        storage = StorageLayout(
            rebuild=not swap,
            pinned=plan.executor == Executor.REPLAY,
            input_leaf=profile.input_leaf if profile.tokens else None,
        )
        return storage.sort(stash, call, captured, parameter_storages(self.block))

    def _rerun(
        self,
        call: BlockCall,
        profile: BlockProfile,
        plan: BlockPlan,
        sorted_: Sorted,
        *,
        count: int,
        ambient: tuple[AutocastState, AttentionState],
    ) -> Rerun:
        """How to run this call again; ``count`` is how many tensors it saved, ``ambient`` what was in force."""
        needs_grad = False
        arguments = call.with_tokens(profile.arguments, plan.tokens)
        if profile.tokens:
            needs_grad = call.leaves[profile.input_leaf].requires_grad
            # The input comes from its piece; the call must not keep the live one.
            call = call.replaced({profile.input_leaf: torch.empty(0)})
        return Rerun(
            block=self.block,
            forward=original_forward(self.block),
            name=self.name,
            call=call.detached(),
            input_leaf=profile.input_leaf,
            input_source=sorted_.input_source,
            input_needs_grad=needs_grad,
            count=count,
            autocast=ambient[0],
            attention=ambient[1],
            arguments=arguments,
            tokens=plan.tokens,
            prefix=0 if profile.dynamic or plan.executor == Executor.RECOMPUTE else plan.prefix,
            pins=sorted_.pins,
        )


    def _witness(self, stash: Stash, profile: BlockProfile, rerun: Rerun) -> Witness:
        """A few values of everything that this call drops."""
        # What is saved in which place is another matter at every call of a dynamic block.
        axes = {} if profile.dynamic else {saved.index: saved.axis for saved in profile.saved}
        witness = Witness(self.name, rerun.prefix, rerun.tokens)
        for index, tensor in enumerate(stash.pending):
            holder = stash.holder(index)
            piece = holder.piece if holder is not None else None
            # Without an axis only a rerun at full length makes the same tensor again.
            comparable = axes.get(index) is not None or not rerun.prefix
            if piece is not None and piece.action in (Action.PREFIX, Action.REBUILD) and comparable:
                witness.see(index, tensor, axes.get(index))
        return witness


def _wanted_by_name(key: PinKey) -> tuple[int, ...] | None:
    return None if pin_kind(key[0]) is not None else ()


def _reruns(plan: BlockPlan) -> bool:
    return plan.executor == Executor.RECOMPUTE or plan.prefix < plan.tokens


def _needs_random(profile: BlockProfile, plan: BlockPlan) -> bool:
    return profile.random and plan.executor == Executor.RECOMPUTE


class _BackwardStarts:
    """Tensor hook on the output of a block that stays on the device; ``kept`` bytes of it, until then."""

    def __init__(self, session: Session, kept: int) -> None:
        self._session = session
        self._step = session.step
        self._lower = session.last_stash
        self._share = Share(session.tools.ledger)
        self._share.hold(kept)

    def __call__(self, _: torch.Tensor) -> None:
        stash = self._lower() if self._lower is not None else None
        self._session.backward_started(self._step)
        if stash is not None:
            stash.fetch()
        self._share.clear()
