"""Tiled execution of a block: what takes the place of its forward.

The block is captured once for each kind of call (``capture/``) and compared with its own forward on random numbers
before it is used. A call is one node of autograd, whose inputs are the block's differentiable arguments and parameters
and whose outputs are everything that the block yields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import fx, nn

from memo_runtime.blocks.ambient import AutocastState, without_autocast
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.containers import unflatten
from memo_runtime.blocks.parametrized import NO_WEIGHTS
from memo_runtime.blocks.real_kernels import RealKernels
from memo_runtime.blocks.undo import Surroundings
from memo_runtime.capture.captured import TRACING, Captured, capture
from memo_runtime.capture.key import Key, capture_key, difference, hooks_of_all_modules
from memo_runtime.capture.recorders import recorded_now
from memo_runtime.capture.watch import StateWatch
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution.compilers import run_eagerly
from memo_runtime.execution.ranges import named
from memo_runtime.execution.tiled_cache import ProgramCache
from memo_runtime.execution.tiled_chain import Input, Yielded, hand_over, linked, result_stage, stored_of
from memo_runtime.execution.tiled_check import check
from memo_runtime.execution.tiled_costs import tensor_bytes
from memo_runtime.execution.tiled_moments import one_of_each
from memo_runtime.execution.tiled_overwrite import holders, sole_holders
from memo_runtime.execution.tiled_products import Products
from memo_runtime.execution.tiled_random import new_seed
from memo_runtime.execution.tiled_rows import is_dense
from memo_runtime.execution.tiled_run import Run, stash_of, states_and_arguments
from memo_runtime.execution.tiled_swap import Entry, TiledSwap
from memo_runtime.execution.tiled_twice import differentiable_once, mark
from memo_runtime.execution.witness import Witness
from memo_runtime.records import TokenAxis

#: Captures that a block keeps: a key may be another at every call, and each holds a graph.
_MOST_CAPTURES = 16
#: Of so many calls each was another kind: that is said, since a capture takes more than many a step.
_RESTLESS = 8


@dataclass(frozen=True, slots=True)
class Way:
    """How one call runs: see ``TiledBlock``.

    ``sent``: of the last tiles whose products are kept, how many have them in host memory. ``groups``: of heads, that
    go through attention one by one. ``ended`` is called with each backward that is over, or with a call that has none.
    ``origin``: the call whose result the input is, from which it is made again instead of stashed
    (``tiled_chain.origin_of``). ``input_stays``: it is stashed on the device though the rest goes to the host.
    ``witness``: compares an input that is made again. ``late``: what it has in host memory comes when it goes backward
    and not before. ``mixer_inputs``: see ``Run``. ``owner``: the block's name.
    """

    tile: int
    alpha: float = 0.0
    swap: TiledSwap | None = None
    to_host: bool = True
    sent: int = 0
    groups: int = 1
    ended: Callable[[Run], None] | None = None
    origin: Any = None
    input_stays: bool = False
    witness: Witness | None = None
    late: bool = False
    mixer_inputs: bool = False
    owner: str = ""


class TiledBlock:
    """One block executed by tiles.

    Args:
        block: the module; its parameters are read at each call.
        tile: tokens of a tile.
        alpha: share of tiles whose matrix products are kept between forward and backward.
        programs: shared by the blocks of a model.
        forward: the block's own forward, where another is installed over it.
        swap: shared host memory of the blocks of a model; None: everything stays on the device.
        to_host: what this block stashes goes to the host; the last blocks of a model had better stay.

    After an exception nothing is left behind: what the call held goes when its graph goes.
    """

    def __init__(
        self,
        block: nn.Module,
        *,
        tile: int,
        alpha: float = 0.0,
        programs: ProgramCache | None = None,
        forward: Callable[..., Any] | None = None,
        swap: TiledSwap | None = None,
        to_host: bool = True,
    ) -> None:
        if tile < 1:
            raise ValueError(f"tile is {tile} tokens; at least 1 is needed")
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha is {alpha}; it is a share, between 0 and 1")
        self.block = block
        self.tile = tile
        self.alpha = alpha
        self.programs = programs if programs is not None else ProgramCache(run_eagerly)
        self.forward = forward
        self.swap = swap
        self.to_host = to_host
        #: Kernels of attention in the last call.
        self.kernels: list[str] = []
        #: Bytes that it left on the device.
        self.bytes_kept = 0
        self._state = StateWatch(block)
        #: The last one used comes last.
        self._captures: list[tuple[Key, Captured]] = []
        self._in_a_row = 0
        #: What is another at every call, so that each captures again; empty: nothing is.
        self.restless = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward; without grad the block's own.

        Raises:
            CaptureRefusedError: the block cannot be executed by tiles; nothing was run.
        """
        if not torch.is_grad_enabled():
            return (self.forward or self.block.forward)(*args, **kwargs)
        call = BlockCall.of(args, kwargs)
        return self.run(self.captured(call), call, self.way())

    def way(self) -> Way:
        """How calls run that say nothing else."""
        return Way(tile=self.tile, alpha=self.alpha, swap=self.swap, to_host=self.to_host)

    def captured(self, call: BlockCall) -> Captured:
        """The capture that serves ``call``; made now if it is the first of its kind.

        Raises:
            CaptureRefusedError: there is none.
        """
        if any(call.caches()[1:]):
            raise CaptureRefusedError("arguments", "a key/value cache that holds tokens already")
        keys = cache(lambda reading: capture_key(self.block, call, reading, self._state.key()))
        serves = (pair for pair in reversed(self._captures) if pair[0] == keys(pair[1].reading) and pair[1].holds(call))
        known = next(serves, None)
        if known is not None:
            found = known[1]
            if known is not self._captures[-1]:
                self._captures.remove(known)
                self._captures.append(known)
            self._in_a_row, self.restless = 0, ""
        else:
            with NO_WEIGHTS.restored():
                found = self._captured_anew(call)
            self._remember(keys(found.reading), found, call)
        return found

    def _captured_anew(self, call: BlockCall) -> Captured:
        call = call.with_own_caches()
        with TRACING:
            found = capture(self.block, call, self.forward)
        if not found.traced.allows(found.tokens(call)):
            raise CaptureRefusedError("forward", f"it takes another way for {found.tokens(call)} tokens")
        if found.signature not in self.programs.checked:
            with RealKernels():
                check(found, self.block, call, partial(_checked_run, found, self.programs.eager()))
            self.programs.checked.add(found.signature)
        return found

    def surroundings(self) -> Key:
        """What of the block, and of what is around it, decides whether it can be captured; its arguments aside."""
        return self._state.key(), recorded_now(), bool(hooks_of_all_modules())

    def _remember(self, key: Key, captured: Captured, call: BlockCall) -> None:
        """Keep ``captured``; of many the oldest goes."""
        self._in_a_row += 1
        if self._captures and self._in_a_row >= _RESTLESS:
            last, other = self._captures[-1]
            self.restless = other.traced.outside.changed() if last == key else difference(last, key, call)
        self._captures.append((key, captured))
        del self._captures[:-_MOST_CAPTURES]

    def run(self, captured: Captured, call: BlockCall, way: Way) -> Any:
        """One call through ``captured``."""
        tokens = captured.tokens(call)
        run = Run(
            captured=captured,
            programs=self.programs,
            tokens=tokens,
            tile=way.tile,
            keep=round(way.alpha * -(-tokens // way.tile)),
            seed=new_seed() if captured.random else 0,
            autocast=AutocastState.current(call.leaves[captured.input_leaf].device.type),
            swap=way.swap,
            to_host=way.to_host,
            products=_products(captured, way),
            sent=way.sent,
            groups=way.groups,
            mixer_inputs=way.mixer_inputs,
            ended=way.ended,
            owner=way.owner,
        )
        output = _apply(run, self.block, call, way)
        if way.ended is not None and not captured.goes_backward:
            way.ended(run)
        self.kernels, self.bytes_kept = run.mixing.names, run.bytes_kept
        return output


def _checked_run(
    captured: Captured, programs: ProgramCache, block: nn.Module, call: BlockCall, tile: int
) -> tuple[Any, Run]:
    """Run with half of the tiles kept, so that a check sees every program."""
    tokens = captured.tokens(call)
    run = Run(
        captured=captured,
        programs=programs,
        tokens=tokens,
        tile=tile,
        keep=-(-tokens // tile) // 2,
        seed=new_seed() if captured.random else 0,
        autocast=AutocastState.current(call.leaves[captured.input_leaf].device.type),
        reproducible=True,
    )
    return _apply(run, block, call, Way(tile=tile)), run


def _apply(run: Run, block: nn.Module, call: BlockCall, way: Way) -> Any:
    captured = run.captured
    sole_holders(run.device.type)  # found out here, not in the middle of a backward
    tensors = [*captured.read_states(block), *(call.leaves[leaf] for _, leaf in captured.arguments)]
    *results, _ = _TiledFunction.apply(run, way, *tensors)  # type: ignore[no-untyped-call]
    if captured.once(result_stage) is not None:
        run.yielded = next(Yielded.of(one) for one in results if isinstance(one, torch.Tensor))
    return unflatten(results, captured.traced.output)


class _TiledFunction(torch.autograd.Function):
    """One block call in autograd's graph."""

    @staticmethod
    def forward(ctx: Any, run: Run, way: Way, *tensors: torch.Tensor) -> tuple[Any, ...]:
        captured = run.captured
        values = dict(zip(run.placeholders(), tensors, strict=True))
        with _given_back(run), without_autocast(tensors[-1].device.type):
            results = run.forward(values)
        extra = [values[node] for node in run.stash()]
        saved = [one for state in run.mixing.saved.values() for one in state.tensors]
        stays = [values[node] for node in run.inputs_that_stay()]
        ctx.run, ctx.counts = run, (len(tensors), len(extra))
        stash = [*tensors, *extra, *saved, *stays]
        ctx.input = _left_out(run, way, stash)
        with _given_back(run):
            ctx.entry = _swapped(run, way, stash, ctx)
        marked = mark(tensors[-1])
        ctx.save_for_backward(*stash, marked)
        for state in run.mixing.saved.values():
            state.tensors = (None,) * len(state.tensors)
        ctx.set_materialize_grads(False)
        outputs = _distinct(results, tensors)
        wanted = captured.stages.differentiable
        constant = [
            out for node, out in zip(captured.outputs, outputs, strict=True)
            if isinstance(out, torch.Tensor) and node not in wanted
        ]  # fmt: skip
        ctx.mark_non_differentiable(*constant)
        return *outputs, marked

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        # Before anything here holds one of them.
        alone = sole_holders(ctx.run.device.type)
        sole = [at for at in range(len(grads)) if alone is not None and holders(grads, at) in alone]
        run: Run = ctx.run
        run.retain = torch._C._autograd._get_current_graph_task_keep_graph()
        surroundings = Surroundings()
        try:
            with without_autocast(run.device.type), named("memo::tiles backward"):
                values = _values(ctx)
                if not run.retain:
                    hand_over(ctx)
                found = run.backward(values, grads[:-1], sole, ctx.entry)
        except BaseException:
            surroundings.restore()
            raise
        finally:
            # Whoever keeps the loss keeps this node: it must hold nothing any more.
            for state in run.mixing.saved.values():
                state.tensors = (None,) * len(state.tensors)
            if ctx.entry is not None:
                ctx.entry.done(retain=run.retain)
            elif ctx.input is not None:
                ctx.input.done(retain=run.retain)
        if run.ended is not None:
            run.ended(run)
        results: list[Any] = [None, None]
        for node in run.placeholders():
            grad = found.take(node)
            results.append(grad.to(node.meta["val"].dtype) if grad is not None else None)
        return tuple(results)


def _values(ctx: Any) -> dict[fx.Node, Any]:
    """What the call ``ctx`` computes its gradients of, on the device."""
    run, made = ctx.run, None
    if ctx.input is not None and ctx.input.late:
        # Of what it is made of nothing is left when the block's own comes.
        if ctx.entry is not None:
            ctx.entry.started()
        made = ctx.input.made()
    stored = stored_of(ctx)[:-1]
    if ctx.entry is not None:
        for place, tensor in ctx.entry.take().items():
            stored[place] = tensor
    if ctx.input is not None:
        stored[ctx.input.place] = made if made is not None else ctx.input.made()
    count, extra = ctx.counts
    values: dict[fx.Node, Any] = dict(zip(run.placeholders(), stored[:count], strict=True))
    values.update(zip(run.stash(), stored[count : count + extra], strict=True))
    rest = iter(stored[count + extra :])
    for state in run.mixing.saved.values():
        state.tensors = tuple(next(rest) for _ in state.tensors)
    values.update(zip(run.inputs_that_stay(), rest, strict=True))
    return values


def _products(captured: Captured, way: Way) -> Products | None:
    if way.swap is None or not way.sent or not captured.goes_backward:
        return None
    return Products(way.swap, stages=len(captured.stages.stages), tile=way.tile)


@contextmanager
def _given_back(run: Run) -> Iterator[None]:
    """Where the forward ends by an exception, whose traceback somebody may keep, products in host memory go at once."""
    try:
        yield
    except BaseException:
        if run.products is not None:
            run.products.sent()
            run.products.done(retain=False)
        raise


def _left_out(run: Run, way: Way, stash: list[Any]) -> Input | None:
    """Take the input out of ``stash`` where it is made again."""
    if way.origin is None or run.captured.once(result_stage) is None:
        return None
    place = _input_place(run.captured)
    tensor, stash[place] = stash[place], None
    return linked(way.origin, Input(way.origin, place, tensor_bytes(tensor), witness=way.witness, late=way.late))


def _input_place(captured: Captured) -> int:
    """Of the input among what a call saves."""
    return len(captured.states) + [leaf for _, leaf in captured.arguments].index(captured.input_leaf)


def _swapped(run: Run, way: Way, stash: list[Any], ctx: Any) -> Entry | None:
    """Start the copies to the host, and take what is copied out of ``stash``.

    Copied are the hidden state, even where it needs no gradient (behind a frozen embedding), inputs with tokens and a
    gradient, results of mixers, and what belongs to these. Other arguments are shared by all blocks (rotary tables,
    masks), and parameters stay. Of a block that does not go backward nothing is wanted again.
    """
    if run.swap is None or not run.captured.goes_backward:
        return None
    captured, known = run.captured, sum(ctx.counts)
    movable, stays = captured.once(_places)
    hidden = _input_place(captured)
    kept = sum(tensor_bytes(one) for products in run.kept.values() for one in products if one.dim())
    kept += sum(tensor_bytes(stash[place]) for place in stays)
    end = len(stash) - len(run.inputs_that_stay())
    kept += sum(map(tensor_bytes, stash[end:]))
    chosen = {}
    for place in (*movable, *range(known, end)):
        tensor = stash[place]
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and is_dense(tensor):
            chosen[place] = tensor
    stay = chosen if not run.to_host else {hidden} & chosen.keys() if way.input_stays else ()
    for place in list(stay):
        kept += tensor_bytes(chosen.pop(place))
    run.bytes_kept = kept
    entry = run.swap.store(chosen, kept=kept, products=run.products, made=ctx.input, late=way.late)
    for place in chosen:
        stash[place] = None
    return entry


def _places(captured: Captured) -> tuple[list[int], list[int]]:
    """Of placeholders and stash: (places that may be copied to the host, those that stay and are counted)."""
    states = {node for node, _ in captured.states}
    given = [*states_and_arguments(captured), *stash_of(captured)]
    made, wanted = set(stash_of(captured)), captured.stages.differentiable
    fixed, hidden = set(captured.stages.fixed), _input_place(captured)
    counted = set(one_of_each(captured.stages.fixed))
    movable, stays = [], []
    for place, node in enumerate(given):
        moves = node in wanted or place == hidden
        if node in counted or (node in made - fixed and node not in wanted):
            stays.append(place)
        if moves and node not in fixed and node not in states and isinstance(captured.stages.axes[node], TokenAxis):
            movable.append(place)
    return movable, stays


def _distinct(results: Sequence[Any], inputs: Sequence[torch.Tensor]) -> list[Any]:
    """Results as objects of their own: autograd takes an input that is yielded, or one tensor twice, for one edge."""
    seen = {id(one) for one in inputs}
    outputs = []
    for one in results:
        if isinstance(one, torch.Tensor):
            if id(one) in seen:
                one = one.view_as(one)
            seen.add(id(one))
        outputs.append(one)
    return outputs
