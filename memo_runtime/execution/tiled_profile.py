"""What a block takes when it runs by tiles: bytes of its stash and of its worst moments, and FLOPs that it repeats.

Sizes follow from the capture, whose lengths are symbols. What a kernel of attention saves and takes beside its tensors
is seen in a run of it (``tiled_trial.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from memo_runtime.blocks.ambient import AutocastState, RandomState
from memo_runtime.blocks.call import BlockCall
from memo_runtime.capture.axes import rows
from memo_runtime.capture.captured import Captured
from memo_runtime.capture.choices import borrowed, kept_values
from memo_runtime.capture.split import Mixer, Segment, mixed_values
from memo_runtime.execution.compilers import Compiler, run_eagerly
from memo_runtime.execution.mixers.attention import (
    Kernel,
)
from memo_runtime.execution.tiled_chain import result_stage
from memo_runtime.execution.tiled_costs import tensor_bytes
from memo_runtime.execution.tiled_growth import polynomial, polynomial_within
from memo_runtime.execution.tiled_heads import grouping, head_count
from memo_runtime.execution.tiled_moments import (
    Needs,
    Workspace,
    moments,
    one_of_each,
    result_moments,
    results_of_mixers,
    stashed_results,
)
from memo_runtime.execution.tiled_overwrite import overwritten
from memo_runtime.execution.tiled_programs import Cost, Programs, RowFactors, make_programs
from memo_runtime.execution.tiled_rows import (
    empty_by_token,
    gapless_like,
    gapless_rows,
    is_dense,
    like,
    packed,
    same_memory,
)
from memo_runtime.execution.tiled_run import mixer_inputs_of, rows_tile
from memo_runtime.execution.tiled_timing import TileTimes
from memo_runtime.execution.tiled_trial import Trial, try_mixer
from memo_runtime.execution.tiled_weights import weights_backward_bytes
from memo_runtime.records import Growth, TiledProfile, TokenAxis

#: Tile at which programs are traced for their cost, on fake tensors; another of twice as many shows what grows.
_TILE = 2048
_USUAL: Mapping[tuple[str, str], Kernel] = MappingProxyType({})


def tiled_profile(
    captured: Captured,
    call: BlockCall,
    times: TileTimes | None = None,
    kernels: Mapping[tuple[str, str], Kernel] = _USUAL,
    *,
    tokens: int | None = None,
    workspace: Callable[[fx.Node], float] | None = None,
    fused: bool = False,
) -> TiledProfile:
    """What ``captured`` takes for calls like ``call``.

    ``times``: how long, if that is known. ``kernels``: of attention, as in ``ProgramCache``. ``tokens``: of longer
    calls. ``workspace``: bytes by token that the backward of a mixer takes beside its tensors, where no run shows it.
    ``fused``: programs are compiled.
    """
    tokens = tokens or captured.tokens(call)
    device = call.leaves[captured.input_leaf].device
    heads = head_count(captured)
    tried: dict[fx.Node, Trial] = {}
    with RandomState.current(device).restored(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        for index, stage in enumerate(captured.stages.stages):
            if isinstance(stage, Mixer):
                kernel = kernels.get((captured.signature, stage.node.name))
                groups = heads if grouping(captured, index) is not None else 1
                tried[stage.node] = try_mixer(captured, stage, tokens, kernel, groups)
    by_token = {node for node, one in tried.items() if one.by_token}
    tracing = _Tracing(captured, tokens, AutocastState.current(device.type), by_token, fused)
    both = {index: tracing.costs(index) for index, stage in enumerate(captured.stages.stages)
            if isinstance(stage, Segment)}  # fmt: skip
    costs, alone = ({index: pairs[which] for index, pairs in both.items()} for which in (0, 1))

    def taken(node: fx.Node, seen: Workspace) -> Workspace:
        return seen if workspace is None else (seen[0], workspace(node))

    needs = Needs(
        costs, alone, _TILE, {node: taken(node, one.workspace) for node, one in tried.items()},
        {mixed_values(stage)[0]: sum(size.linear for size in tried[stage.node].saved)
         for stage in captured.stages.stages if isinstance(stage, Mixer)},
        {node: one.merging for node, one in tried.items()},
        polynomial_within(
            partial(weights_backward_bytes, captured, autocast=tracing.autocast), tokens, captured.traced.allows
        ),
    )  # fmt: skip
    needs_by_groups = replace(needs, workspaces={node: taken(node, one.by_group) for node, one in tried.items()})
    forward, backward = moments(captured, needs, tokens)
    by_groups = moments(captured, needs_by_groups, tokens, by_groups=True) if heads > 1 else ((), ())
    stays = captured.once(mixer_inputs_of)
    with_inputs = moments(captured, needs, tokens, stays=stays) if stays else ((), ())
    again, saved, products = _repeated(captured, costs, tokens)
    found = TiledProfile(
        stash=tuple(_stash(captured, call, tried.values(), tokens)),
        resident=_stays(captured, costs, tokens),
        products=products,
        forward=forward,
        backward=backward,
        again_flops=again,
        saved_flops=saved,
        attention=tuple(one.kernel.name for one in tried.values()),
        queries=tuple(one.kernel.queries for one in tried.values()),
        heads=heads,
        forward_by_groups=by_groups[0],
        backward_by_groups=by_groups[1],
        group_flops=_by_each_group(captured, costs),
        elements=_most_elements(captured, tokens),
        mixer_inputs=_total(captured, stays, tokens),
        mixer_input_flops=_of_mixer_inputs(captured, costs),
        forward_with_inputs=with_inputs[0],
        backward_with_inputs=with_inputs[1],
        # An input with gaps stays where it is: the stash has none that could be made again.
        result=result_moments(captured, needs, tokens) if is_dense(call.leaves[captured.input_leaf]) else (),
        result_flops=_of_result(captured, costs),
    )
    return found if times is None else _timed(found, times, costs)


def _timed(profile: TiledProfile, times: TileTimes, costs: dict[int, tuple[Cost, Cost]]) -> TiledProfile:
    """``profile`` with seconds; what is run again takes what its FLOPs take in the forward."""
    flops = _forward_flops(costs.values())
    with_products = _forward_flops(pair for pair in costs.values() if pair[0].product_bytes)
    rate = times.segment / flops if flops else 0.0
    again, backward = profile.again_flops, times.backward
    return replace(
        profile,
        forward_seconds=times.forward,
        backward_seconds=replace(backward, linear=max(0.0, backward.linear - rate * again.linear)),
        seconds_per_flop=rate,
        saved_seconds=Growth(linear=times.saved),
        product_seconds=Growth(linear=rate * with_products),
    )


def _forward_flops(costs: Iterable[tuple[Cost, Cost]]) -> float:
    """By token, of the segments; those in chunks of queries are not timed."""
    return sum(cost.forward / _TILE for cost, _ in costs)


@dataclass(frozen=True, slots=True)
class _Tracing:
    """How segments are traced for their cost; ``by_token``, ``fused``: as in ``tile_programs``."""

    captured: Captured
    tokens: int
    autocast: AutocastState
    by_token: Collection[fx.Node]
    fused: bool

    def costs(self, index: int) -> tuple[tuple[Cost, Cost], tuple[Cost, Cost]]:
        """Of stage number ``index``, at a tile and at one of twice its tokens: (one of several, one alone)."""
        one, two = self._cost(index, _TILE), self._cost(index, 2 * _TILE)
        return (one[0], two[0]), (one[1], two[1])

    def _cost(self, index: int, tile: int) -> tuple[Cost, Cost]:
        programs, tile = tile_programs(
            self.captured, index, self.tokens, tile, self.autocast, by_token=self.by_token, fused=self.fused
        )
        segment = self.captured.segment(index)
        # Tiles of rows of a mask are never alone.
        whole = 2 * tile if segment.by_rows else tile
        return self._with_copies(segment, programs, tile, 2 * tile), self._with_copies(segment, programs, tile, whole)

    def _with_copies(self, segment: Segment, programs: Programs, tile: int, tokens: int) -> Cost:
        """What ``programs`` take, with copies of the rows of a tile, of ``tokens`` tokens in all."""
        given, made, tangents = self._copies(segment, programs.layouts, tile, tokens)
        products, cost = self._products(segment, programs, tile, tokens), programs.cost
        return replace(
            cost,
            forward_bytes=cost.forward_bytes.beside(given + made),
            backward_bytes=cost.backward_bytes.adding(products).beside(given + tangents),
        )

    def _copies(
        self, segment: Segment, layouts: Sequence[torch.Tensor], tile: int, tokens: int
    ) -> tuple[int, int, int]:
        """Bytes that a tile of ``segment`` takes beside its programs: (of its sources, outputs, gradients of outputs).

        Where the rows of a tile do not lie together in memory they are copied, and masks of dropout are drawn.
        Gradients that attention makes are taken to lie in some other order than ``layouts`` asks for.
        """
        drawn = {draw.mask for draw in self.captured.draws}
        given = made = tangents = 0
        for node in segment.sources:
            axis = segment.axes[node]
            if axis is None:
                continue
            whole = self._whole(node, axis, tokens)
            part = packed(whole, axis, tokens, 0, tile)
            if node in drawn or part.untyped_storage()._cdata != whole.untyped_storage()._cdata:
                given += part.numel() * part.element_size()
        for node, layout in zip(segment.outputs, layouts, strict=True):
            axis = segment.axes[node]
            assert axis is not None, "a segment yields values with tokens"
            whole = like(layout, axis, tokens, tile)
            part = rows(whole, axis, tokens, 0, tile)
            if gapless_rows(whole, axis, 0, tile) is None:
                made += part.numel() * part.element_size()
            if axis.outer != 1 or axis.inner != 1:
                part = part.flatten(axis.dim, axis.dim + 2)
            if node not in self.captured.outputs or not same_memory(part, layout):
                tangents += part.numel() * part.element_size()
        return given, made, tangents

    def _products(self, segment: Segment, programs: Programs, tile: int, tokens: int) -> int:
        """Bytes of the largest gradient of a tile that is left to a GEMM, where that cannot write to its place.

        The rows of several sequences do not lie together; and what goes over another gradient may be read from it.
        """
        over, largest = overwritten(self.captured), 0
        for source, place in zip(segment.sources, programs.places, strict=False):
            axis = segment.axes[source]
            if not isinstance(place, RowFactors) or axis is None:
                continue
            whole = self._whole(source, axis, tokens)
            target = gapless_rows(whole, axis, 0, tile)
            if source in over or target is None or not same_memory(target, place.layout):
                largest = max(largest, tensor_bytes(place.layout))
        return largest

    def _whole(self, node: fx.Node, axis: TokenAxis, rows: int) -> torch.Tensor:
        by_token = node in self.by_token
        return _whole(self.captured, node.meta["val"], axis, (rows, self.tokens), by_token=by_token)


def _whole(
    captured: Captured, value: torch.Tensor, axis: TokenAxis | None, lengths: tuple[int, int], *, by_token: bool
) -> torch.Tensor:
    """The traced ``value`` on meta, as it lies in memory.

    ``lengths``: tokens along ``axis``, and along another dimension that grows with them (rows of a mask have all keys).
    """
    rows, tokens = lengths
    several = axis is None or len(captured.traced.token.dims(value)) > 1
    shape, stride = ([int(captured.size(one, tokens if several else rows)) for one in many]
                     for many in (value.shape, value.stride()))  # fmt: skip
    if axis is not None:
        shape[axis.dim] = axis.outer * rows * axis.inner
    whole = torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")
    if by_token:
        return empty_by_token(shape, whole)
    return gapless_like(whole, whole.device) if several else whole


def tile_programs(
    captured: Captured,
    index: int,
    tokens: int,
    tile: int,
    autocast: AutocastState,
    *,
    compiler: Compiler = run_eagerly,
    by_token: Collection[fx.Node] = (),
    fused: bool = False,
) -> tuple[Programs, int]:
    """(programs of stage number ``index``, traced on fake tensors, their tile: ``tile`` tokens, or rows of a mask).

    ``by_token``: values ``[B, H, T, D]`` that lie in memory token by token, with all heads of each. ``fused``: their
    bytes are those of programs that are compiled.
    """
    segment = captured.segment(index)
    tile = rows_tile(captured, segment, tokens, tile)
    mode = FakeTensorMode()
    values = [(node.meta["val"], segment.axes[node], node in by_token) for node in segment.sources]
    for node, _, _ in borrowed(captured.stages, index):
        values.extend((*kept, False) for kept in kept_values(captured.stages, node))
    sources = []
    for value, axis, apart in values:
        # As tiles are cut: in the memory order of what they are cut from, which a product may have to copy.
        whole = _whole(captured, value, axis, (2 * tile, tokens), by_token=apart)
        part = whole if axis is None else packed(whole, axis, 2 * tile, 0, tile)
        with mode:
            sources.append(torch.empty_strided(part.shape, part.stride(), dtype=value.dtype, device=value.device))
    return make_programs(captured, index, sources, tile, autocast, compiler=compiler, fused=fused), tile


def _repeated(
    captured: Captured, costs: dict[int, tuple[Cost, Cost]], tokens: int
) -> tuple[Growth, Growth, tuple[Growth, ...]]:
    """(FLOPs that backward runs again, less of it by kept tokens, bytes of each stage by kept tokens)."""
    linear = quadratic = saved = 0.0
    products = dict.fromkeys(range(len(captured.stages.stages)), Growth())
    stages = captured.stages.stages
    for index, (cost, _) in costs.items() if captured.goes_backward else ():
        segment = stages[index]
        assert isinstance(segment, Segment), "only segments have costs"
        if segment.by_rows:
            quadratic += cost.again / rows_tile(captured, segment, tokens, _TILE) / tokens
            continue
        linear += (cost.again + (cost.forward if _feeds(captured, index) else 0)) / _TILE
        saved += (cost.again - cost.again_kept) / _TILE
        products[index] = Growth(linear=cost.product_bytes / _TILE)
    return Growth(linear=linear, quadratic=quadratic), Growth(linear=saved), tuple(products.values())


def _feeds(captured: Captured, index: int) -> bool:
    """A mixer is behind segment number ``index``, so that its outputs are made again in backward."""
    (behind,) = captured.stages.stages[index + 1 : index + 2] or (None,)
    return isinstance(behind, Mixer) or (isinstance(behind, Segment) and behind.by_rows)


def _of_mixer_inputs(captured: Captured, costs: dict[int, tuple[Cost, Cost]]) -> Growth:
    """FLOPs of making again what mixers are given; none where that cannot stay."""
    if not captured.once(mixer_inputs_of):
        return Growth()
    some = (index for index in costs if not captured.segment(index).by_rows and _feeds(captured, index))
    return Growth(linear=sum(costs[index][0].forward for index in some) / _TILE)


def _by_each_group(captured: Captured, costs: dict[int, tuple[Cost, Cost]]) -> Growth:
    """FLOPs of the segments that run once more in forward, and in a backward, for each group of heads."""
    count = len(captured.stages.stages)
    again = [costs[index - 1][0].forward for index in range(1, count) if grouping(captured, index) is not None]
    return Growth(linear=(1 + captured.goes_backward) * sum(again) / _TILE)


def _of_result(captured: Captured, costs: dict[int, tuple[Cost, Cost]]) -> Growth:
    """FLOPs of making the block's result again."""
    index = result_stage(captured)
    return Growth(linear=costs[index][0].forward / _TILE) if index is not None else Growth()


def _most_elements(captured: Captured, tokens: int) -> Growth:
    """Of what attention that can run by groups of heads is given or yields, by tokens."""
    found = [grouping(captured, index) for index in range(len(captured.stages.stages))]
    nodes = [node for how in found if how is not None for node in (how.result, *how.sliced)]

    def most(length: int) -> float:
        return float(max((captured.size(node.meta["val"].numel(), length) for node in nodes), default=0))

    return polynomial(most, tokens)


def _stays(captured: Captured, costs: dict[int, tuple[Cost, Cost]], tokens: int) -> Growth:
    """What stays on the device between forward and backward, choices of experts included."""
    if not captured.goes_backward:
        return Growth()
    fixed = _total(captured, _resident(captured), tokens)
    choices = sum(cost.choice_bytes / _TILE for cost, _ in costs.values())
    return replace(fixed, linear=fixed.linear + choices)


def _total(captured: Captured, nodes: list[fx.Node], tokens: int) -> Growth:
    values = [node.meta["val"] for node in nodes if isinstance(node.meta["val"], torch.Tensor)]

    def size(length: int) -> float:
        return float(sum(captured.size(value.numel(), length) * value.element_size() for value in values))

    return polynomial(size, tokens)


def _resident(captured: Captured) -> list[fx.Node]:
    """Values made in forward that backward needs and that stay: masks, and results that need no gradient."""
    chosen = stashed_results(captured)
    results = (node for node in results_of_mixers(captured) if node not in chosen)
    return [*one_of_each(captured.stages.fixed), *results]


def _stash(captured: Captured, call: BlockCall, tried: Iterable[Trial], tokens: int) -> list[Growth]:
    """Bytes of each tensor that ``tiled._swapped`` would send to the host."""
    if not captured.goes_backward:
        return []
    arguments = [
        node for node, leaf in captured.arguments
        if call.leaves[leaf].is_floating_point() and is_dense(call.leaves[leaf])
        and (node in captured.stages.differentiable or leaf == captured.input_leaf)
        and isinstance(captured.stages.axes[node], TokenAxis)
    ]  # fmt: skip
    found = [_total(captured, [node], tokens) for node in [*arguments, *stashed_results(captured)]]
    return [*found, *(size for one in tried for size in one.saved)]
