"""A wrapped block that runs by tiles: what ``BlockForward`` and the session need around ``TiledBlock``."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from memo_runtime.blocks.call import BlockCall, first_tensor
from memo_runtime.blocks.containers import mapped
from memo_runtime.capture.captured import TRACING, Captured
from memo_runtime.capture.experts import with_experts
from memo_runtime.capture.key import Key
from memo_runtime.capture.split import Mixer
from memo_runtime.errors import BlockFallbackError, CaptureRefusedError
from memo_runtime.execution.compilers import compiled, run_eagerly
from memo_runtime.execution.counters import BlockCounters, StepCounters
from memo_runtime.execution.install import original_forward
from memo_runtime.execution.mixers.attention import Kernel
from memo_runtime.execution.ranges import named
from memo_runtime.execution.tiled import TiledBlock, Way
from memo_runtime.execution.tiled_cache import ProgramCache
from memo_runtime.execution.tiled_chain import input_axis, origin_of, result_stage
from memo_runtime.execution.tiled_overwrite import sole_holders
from memo_runtime.execution.tiled_profile import tiled_profile
from memo_runtime.execution.tiled_run import Run
from memo_runtime.execution.tiled_swap import Entry, TiledSwap
from memo_runtime.execution.tiled_timing import time_tiles
from memo_runtime.execution.witness import Witness
from memo_runtime.records import BlockPlan, BlockProfile, Demotion, Executor, Profile, TiledProfile

if TYPE_CHECKING:
    from memo_runtime.execution.block import BlockForward
    from memo_runtime.execution.session import Session


_NOT_CALLED = "it was not called when the model was profiled, so nothing is known of its tiles"


#: So often a block that was refused is tried by tiles again.
_MOST_REFUSALS = 3

_NOT_FROM_BELOW = (
    "its input is not the result of the block below as when the model was profiled, so it is not made again from it"
)
_RESTLESS = (
    "blocks that run by tiles are captured anew at every call, which may take longer than the call: {what} is another "
    "each time. Would work: give blocks the same object every time, and numbers that change as tensors"
)
_ELSEWHERE = (
    "tiles would be of the {tokens:,} tokens in dimension {dim} of its input, and its profile is of the {others:,} in "
    "dimension {other}"
)
_EXPERTS = "{why}. If its '{name}' treats tokens one by one, as routed experts do, declare it: memo.token_wise"
_HELD = (
    "the gradient of its result is held elsewhere too (a hook that keeps it, a sum behind the block), so its backward "
    "takes one tensor of full length more than planned"
)
_LAID = (
    "the gradient of its result does not lie in memory as its input does (another order of dimensions, one number for "
    "all, another type), so its backward takes one tensor of full length more than planned"
)


def new_programs(device: torch.device) -> ProgramCache:
    """Programs for the blocks of one model: compiled on CUDA, as they are on CPU."""
    return ProgramCache(compiled if device.type == "cuda" else run_eagerly)


class _InSession:
    """The order of blocks as the session keeps it, across executors."""

    def __init__(self, session: Session, position: int) -> None:
        self._session = session
        self._position = position
        self._step = session.step
        self.departures = session.departures

    def stored(self, entry: Entry) -> None:
        """See ``tiled_swap.Order``."""
        entry.lower = self._session.last_stash
        self._session.follow(weakref.ref(entry), self._position, weakref.ref(entry))

    def started(self, entry: Entry) -> None:
        """See ``tiled_swap.Order``."""
        self._session.before_backward(self._step)


class _Ended:
    """Counts what a backward has run again."""

    def __init__(self, session: Session, counters: BlockCounters, block: BlockForward) -> None:
        self._session = session
        self._name = block.name
        #: The last block is planned for gradients that others hold.
        self._planned = block is session.blocks[-1]
        self._step: StepCounters = session.step
        self._counters = counters

    def __call__(self, run: Run) -> None:
        self._counters.recomputed_flops += run.again_flops
        run.again_flops = 0
        if not self._planned and sole_holders(run.device.type) is not None:
            for found, text in ((run.held_elsewhere, _HELD), (run.laid_otherwise, _LAID)):
                if found:
                    self._session.note(f"'{self._name}': {text}")
        self._step.clock.touch()


class TiledForward:
    """The tiles of one wrapped block."""

    def __init__(self, owner: BlockForward) -> None:
        self._owner = owner
        self._tiles: TiledBlock | None = None
        #: (dimension of its input where it has its tiles, how many tokens these are of), once it is profiled.
        self.along = (0, 0)
        self._refused_in: Key | None = None
        self._refusals = 0

    def _block(self) -> TiledBlock:
        if self._tiles is None:
            owner = self._owner
            programs, forward = owner.session.programs, original_forward(owner.block)
            self._tiles = TiledBlock(owner.block, tile=1, programs=programs, forward=forward)
        return self._tiles

    def give_up(self) -> None:
        """It could be captured when it was planned, and now is refused."""
        self._refused_in = self._block().surroundings()
        self._refusals += 1

    @property
    def tries_again(self) -> bool:
        """It was not refused so often that no other way out is left."""
        return self._refusals <= _MOST_REFUSALS

    @property
    def may_try_again(self) -> bool:
        """Something is another than when it was refused: a hook has gone, an output is not recorded any more.

        Not after many refusals, each of which costs a step that nothing manages.
        """
        return self._refused_in is not None and self.tries_again and self._refused_in != self._block().surroundings()

    def profile(
        self, call: BlockCall, tile: int | None, known: TiledProfile | None = None
    ) -> tuple[TiledProfile | None, str]:
        """(what the block takes by tiles, why it cannot run so).

        ``tile``: as the user has fixed it. ``known``: what follows from another number of sequences, whose kernels and
        times are not looked for again.
        """
        try:
            captured = self._block().captured(call)
            self.along = captured.token_dim, captured.tokens(call)
            key = (captured.signature, captured.tokens(call))
            found, programs = self._owner.session.tiled_profiles, self._owner.session.programs
            if key not in found:
                # On CPU programs are the block's own operators: its own times are theirs.
                on_gpu = call.leaves[captured.input_leaf].device.type == "cuda"
                if known is not None:
                    _remember_kernels(programs, captured, known)
                timed = time_tiles(self._block(), captured, call, tile) if on_gpu and known is None else None
                with TRACING:
                    seen = tiled_profile(captured, call, timed, programs.kernels, fused=on_gpu)
                found[key] = seen if known is None else _with_times_of(known, seen)
            return found[key], ""
        except CaptureRefusedError as error:
            experts = with_experts(self._owner.block)
            return None, _EXPERTS.format(why=error, name=experts) if experts else str(error)

    def run(self, call: BlockCall, profile: BlockProfile, plan: BlockPlan, counters: BlockCounters) -> Any:
        """One call as ``plan`` says.

        Raises:
            CaptureRefusedError: it cannot be captured any more, or not for this kind of call; nothing was run.
        """
        session, tiles = self._owner.session, self._block()
        captured = tiles.captured(call)
        if tiles.restless:
            session.note(_RESTLESS.format(what=tiles.restless))
        if captured.random:
            session.note_masks()
        tools, tokens = session.tools, captured.tokens(call)
        tile = min(plan.tile, tokens)
        swap = TiledSwap(
            tools.device, tools.pool, tools.engine,
            order=_InSession(session, self._owner.position), counters=counters, ledger=tools.ledger,
        )  # fmt: skip
        count = -(-tokens // tile)
        kept = count if plan.prefix >= plan.tokens else plan.prefix * tokens // plan.tokens // tile
        ended = _Ended(session, counters, self._owner)
        stays = (plan.prefix - plan.sent) * tokens // plan.tokens // tile if plan.sent else kept
        way = Way(
            tile=tile, alpha=kept / count, swap=swap, to_host=not plan.device_rows, sent=kept - stays,
            groups=plan.groups, ended=ended, late=plan.late, mixer_inputs=plan.mixer_inputs, owner=self._owner.name,
        )  # fmt: skip
        if plan.from_below:
            way = self._made_again(way, call.leaves[captured.input_leaf], captured, plan)
        if profile.tiled is not None:
            _remember_kernels(session.programs, captured, profile.tiled)
        with named(f"memo::tiles {self._owner.name}"):
            output = tiles.run(captured, call, way)
        counters.alpha, counters.attention = plan.alpha, tuple(tiles.kernels)
        counters.bytes_kept += tiles.bytes_kept
        return output


    def _made_again(self, way: Way, source: torch.Tensor, captured: Captured, plan: BlockPlan) -> Way:
        """``way`` for a call whose input is planned to be made again; where it cannot be, the input stays."""
        session, name = self._owner.session, self._owner.name
        origin = origin_of(source)
        ours = origin is not None and origin.run.programs is session.programs
        if not ours or origin.run.owner != session.below(name) or captured.once(result_stage) is None:
            session.demotions.setdefault(name, Demotion(reason=_NOT_FROM_BELOW, rerunnable=True, unchained=True))
            session.note(f"'{name}': {_NOT_FROM_BELOW}. In this step it stays on the device; the next is planned anew")
            return replace(way, input_stays=True)
        witness = None
        if session.asks_for_witness(name, plan):
            witness = Witness(name, prefix=0, tokens=source.shape[captured.token_dim])
            witness.see(0, source.detach(), input_axis(captured))
        return replace(way, origin=origin, witness=witness)


def _remember_kernels(programs: ProgramCache, captured: Captured, takes: TiledProfile) -> None:
    """The kernels that the plan was made with: where it comes from a file, they were not timed here."""
    mixers = [stage for stage in captured.stages.stages if isinstance(stage, Mixer)]
    if len(mixers) == len(takes.attention) == len(takes.queries):
        for mixer, name, queries in zip(mixers, takes.attention, takes.queries, strict=True):
            programs.kernels.setdefault((captured.signature, mixer.node.name), Kernel(name, queries))


def _with_times_of(known: TiledProfile, seen: TiledProfile) -> TiledProfile:
    return replace(
        seen,
        forward_seconds=known.forward_seconds,
        backward_seconds=known.backward_seconds,
        seconds_per_flop=known.seconds_per_flop,
        saved_seconds=known.saved_seconds,
        product_seconds=known.product_seconds,
    )


class Tiling:
    """What the blocks of a model take by tiles, seen while it is profiled.

    ``tile``: as the user has fixed it. ``known``: what follows for these calls from others, with their times.
    """

    def __init__(self, tile: int | None = None, known: Profile | None = None) -> None:
        self._tile = tile
        self._known = {block.name: block.tiled for block in known.blocks} if known is not None else {}
        self._found: dict[str, tuple[TiledProfile | None, str]] = {}
        self._along: dict[str, tuple[int, int]] = {}
        #: By block, the one whose result is its input.
        self._below: dict[str, str] = {}
        #: The last result, which only its pass holds: what is in use afterwards is measured.
        self._last: tuple[str, weakref.ref[torch.Tensor], int] | None = None

    def see(self, block: BlockForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the first call of ``block``."""
        if block.name not in self._found:
            call = BlockCall.of(args, kwargs)
            source = call.leaves[call.input_leaf] if call.input_leaf is not None else None
            if self._last is not None:
                name, result, version = self._last
                if source is result() and source is not None and source._version == version:
                    self._below[block.name] = name
            empty = (None, "its input is empty")
            known = self._known.get(block.name)
            self._found[block.name] = empty if call.is_empty else block.tiles.profile(call, self._tile, known)
            self._along[block.name] = block.tiles.along

    def made(self, block: BlockForward, output: Any) -> Any:
        """Take note of what the call of ``block`` yields, as an object of its own: it stands for the result."""
        first = first_tensor(output)
        if first is None:
            return output
        # No leaf: what comes behind it may write into it.
        alias = first.detach().requires_grad_().clone()
        self._last = block.name, weakref.ref(alias), alias._version
        return mapped(lambda one: alias if one is first else one, output)

    def added_to(self, profile: Profile) -> Profile:
        """``profile`` with what was found."""
        blocks: list[BlockProfile] = []
        for block in profile.blocks:
            # One that this pass did not call may be known from another.
            known = block.tiled, block.tiled_reason or ("" if block.tiled else _NOT_CALLED)
            takes, reason = self._found.get(block.name, known)
            if takes is not None and block.name in self._found:
                lower = blocks[-1].name if blocks else ""
                takes = replace(takes, chained=self._below.get(block.name) == lower)
                reason = self._elsewhere(block)
                takes = None if reason else takes
            blocks.append(replace(block, tiled=takes, tiled_reason=reason))
        return replace(profile, blocks=tuple(blocks))

    def _elsewhere(self, block: BlockProfile) -> str:
        """Why nothing can be planned for tiles of ``block``: its profile is of other tokens; empty: it is of these."""
        dim, tokens = self._along[block.name]
        if not block.tokens or dim == block.token_dim or tokens == block.tokens:
            return ""
        return _ELSEWHERE.format(tokens=tokens, dim=dim, others=block.tokens, other=block.token_dim)


def give_up_tiles(session: Session, block: BlockForward, error: CaptureRefusedError) -> None:
    """A block that was planned by tiles cannot run so: as it is in this step, and planned anew for the next.

    Where what is in the way goes, it is planned by tiles again.

    Raises:
        BlockFallbackError: ``strict``.
    """
    reason = f"by tiles it was captured before, and now is not: {error}"
    if session.strict:
        raise BlockFallbackError(f"strict=True and '{block.name}' cannot take policy 'tiled': {reason}") from error
    block.tiles.give_up()
    session.demotions[block.name] = Demotion(reason=reason, rerunnable=True, tiles_only=True)
    counters = session.step.block(block.name)
    counters.executor, counters.reason = Executor.NATIVE, reason
    until = "as long as that is so" if block.tiles.tries_again else "since that came and went too often"
    session.note(
        f"'{block.name}' is not managed in this step: {reason}. From the next step on it runs in another way, {until}"
    )


def try_tiles_again(session: Session) -> None:
    """Before a step is planned: forget refusals whose reason may have gone."""
    for block in session.blocks:
        found = session.demotions.get(block.name)
        if found is not None and found.tiles_only and block.tiles.may_try_again:
            del session.demotions[block.name]
