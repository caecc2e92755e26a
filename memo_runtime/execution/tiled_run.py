"""One call of a captured block: forward and backward in stages, tile by tile.

    forward    segment (tiles) -> q, k, v | mixer -> o, lse | segment (tiles) -> y
    backward   segment (tiles): dy -> dx, do, dW | q, k, v again | mixer: do -> dq, dk, dv | segment (tiles) -> dx, dW

Between the two live the block's arguments, the result and log-sum-exp of every mixer, and for the first tiles (``keep``
of them) the matrix products of their segments. Full-length tensors alive at the worst moment of a backward, for a block
with one attention: x, o, dx (over dy), do, q, k, v, dq, dk, dv; with attention by groups of heads (``tiled_mixing.py``)
x, o, dx and do alone, and of one group the rest.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree

from memo_runtime.blocks.ambient import AutocastState, without_autocast
from memo_runtime.capture.captured import Captured
from memo_runtime.capture.choices import borrowed, count_kept
from memo_runtime.capture.split import Mixer, Segment, mixed_values, mixer_inputs, mixing_stages
from memo_runtime.execution.mixers.by_rows import MAX_SCORES
from memo_runtime.execution.tiled_cache import ProgramCache
from memo_runtime.execution.tiled_chain import Input, Yielded, result_stage
from memo_runtime.execution.tiled_gradients import Gradients, Part, met_once, tangent
from memo_runtime.execution.tiled_heads import Grouping, HeadPart, Heads, grouping, part_of
from memo_runtime.execution.tiled_mixing import Mixing, Values
from memo_runtime.execution.tiled_overwrite import overwritten
from memo_runtime.execution.tiled_products import Products
from memo_runtime.execution.tiled_programs import Programs, run_node
from memo_runtime.execution.tiled_random import bernoulli, mixed_seed
from memo_runtime.execution.tiled_rows import gapless_like, gapless_rows, like, packed, write
from memo_runtime.execution.tiled_swap import Entry, TiledSwap
from memo_runtime.records import TokenAxis


def rows_tile(captured: Captured, segment: Segment, tokens: int, tile: int) -> int:
    """Tokens of a tile of ``segment``: ``tile``, or fewer where each takes a row of scores."""
    if not segment.by_rows:
        return tile
    values = [one for node in segment.nodes for one in _pytree.tree_leaves(node.meta["val"])]
    sizes = ([int(captured.size(size, tokens)) for size in one.shape] for one in values)
    scores = max(math.prod(one) // tokens for one in sizes)
    return max(1, min(tile, MAX_SCORES // max(1, scores)))


def _device_of(captured: Captured) -> torch.device:
    device: torch.device = captured.arguments[0][0].meta["val"].device
    return device


def states_and_arguments(captured: Captured) -> list[fx.Node]:
    """Placeholders of what a call is given: parameters, buffers and arguments."""
    return [node for node, _ in (*captured.states, *captured.arguments)]


def stash_of(captured: Captured) -> list[fx.Node]:
    """The values that backward needs of forward, beside placeholders."""
    stages = captured.stages
    results = [node for stage in stages.stages for node in mixed_values(stage)]
    # Of an operator that yields several values its members are there, each for itself.
    return [*results, *(node for node in stages.fixed if isinstance(node.meta["val"], torch.Tensor))]


def mixer_inputs_of(captured: Captured) -> list[fx.Node]:
    """What segments make for the mixers of ``captured``; none where it cannot stay, or nothing goes backward."""
    return mixer_inputs(captured.stages.stages, captured.outputs) if captured.goes_backward else []


def _borrowed_by(captured: Captured, index: int) -> list[tuple[fx.Node, int, int]]:
    return borrowed(captured.stages, index)


@dataclass(slots=True)
class Run:
    """The state of one call between its forward and its backward.

    Args:
        captured: what runs.
        programs: compiled or plain programs of its segments.
        tokens: length of this call.
        tile: tokens of a tile; the last one may be shorter.
        keep: number of tiles, from the first, whose matrix products are kept.
        retain: backward leaves them for another one. ended: called with each backward that is over.
        again_flops: of operators that backward has run again. bytes_kept: on the device between the two.
        held_elsewhere: a gradient that it was given could not be written over. laid_otherwise: since it does not lie in
            memory as the input does, or is of another type.
        seed: of its dropout.
        autocast: the precision of the call.
        swap: host memory for its stash. to_host: use it; a block that does not still keeps the order of blocks.
        products: host memory for those of the last ``sent`` of the tiles that are kept.
        reproducible: attention drops what ``attention_seed`` says, also where a fused kernel would draw itself.
        mixer_inputs: what mixers are given stays between the two, and is not made again; not with groups.
        groups: of heads, one of which goes through attention at a time, where attention can be divided so.
        mixing: its mixers.
        owner: the block's name. yielded: its result as it was. above: inputs that are made again from it.
    """

    captured: Captured
    programs: ProgramCache
    tokens: int
    tile: int
    keep: int
    seed: int
    autocast: AutocastState
    swap: TiledSwap | None = None
    to_host: bool = False
    products: Products | None = None
    sent: int = 0
    reproducible: bool = False
    mixer_inputs: bool = False
    groups: int = 1
    mixing: Mixing = field(init=False)
    #: Where the block computes.
    device: torch.device = field(init=False)
    #: By stage and start of a tile: choices of declared modules, then products.
    kept: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)
    retain: bool = False
    ended: Callable[[Run], None] | None = None
    again_flops: int = 0
    held_elsewhere: bool = False
    laid_otherwise: bool = False
    bytes_kept: int = 0
    owner: str = ""
    yielded: Yielded | None = None
    above: list[weakref.ref[Input]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = self.captured.once(_device_of)
        self.mixing = Mixing(
            self.captured, self.programs.kernels, self.tokens, self.seed, self.autocast, self.reproducible
        )

    # ---- forward

    def forward(self, values: Values) -> list[Any]:
        """Outputs of the block; ``values`` holds its placeholders and gains the results of mixers."""
        stages = self.captured.stages
        self._run_whole(stages.fixed, values)
        self._run_whole(stages.weights, values)
        for index, stage in enumerate(stages.stages):
            how = self._grouping(index)
            if isinstance(stage, Mixer):
                if how is not None:
                    make = partial(self._make_group, index - 1, how, values, keep=True)
                    self.mixing.forward_by_groups(how, self.groups, values, make)
                else:
                    self.mixing.forward(stage, values)
                self._drop_inputs(index, values)
            elif self._grouping(index + 1) is None:
                self._segment_forward(index, stage, values, keep=True)
                if stage.by_rows:
                    self._drop_inputs(index, values)
        return [self._output(one, values) for one in self.captured.outputs]

    def _output(self, one: Any, values: Values) -> Any:
        """A value, a constant, or a size, which is no value of any stage."""
        if not isinstance(one, fx.Node):
            return one
        given = one.meta["val"]
        return values[one] if isinstance(given, torch.Tensor) else self.captured.size(given, self.tokens)

    def placeholders(self) -> list[fx.Node]:
        """Parameters and arguments."""
        return self.captured.once(states_and_arguments)

    def stash(self) -> list[fx.Node]:
        """The values that backward needs of forward, beside placeholders."""
        return self.captured.once(stash_of)

    def inputs_that_stay(self) -> list[fx.Node]:
        """What mixers are given, where it stays."""
        return self.captured.once(mixer_inputs_of) if self.mixer_inputs else []

    def _run_whole(self, nodes: Sequence[fx.Node], values: Values) -> None:
        if not nodes:
            return
        with self.autocast.uncached().restored():
            for node in nodes:
                values[node] = run_node(node, values, lambda size: self.captured.size(size, self.tokens))

    def _grouping(self, index: int) -> Grouping | None:
        """How stage number ``index`` runs by groups of heads; None: it does not."""
        if self.groups == 1 or index == len(self.captured.stages.stages):
            return None
        found = grouping(self.captured, index)
        return found if found is not None and found.heads % self.groups == 0 else None

    def _make_group(self, index: int, how: Grouping, values: Values, group: Heads, *, keep: bool) -> None:
        """Run segment number ``index`` for one group of heads of the attention behind it."""
        part = (group, how.sliced)
        self._segment_forward(index, how.segment, values, keep=keep and group.number == 0, part=part)

    def _drop_inputs(self, index: int, values: Values) -> None:
        """Inputs of a mixer that a segment computed for it are rebuilt in backward, unless they stay to its end."""
        before = self.captured.stages.stages[index - 1] if index else None
        if isinstance(before, Segment) and not before.by_rows and not self.mixer_inputs:
            yielded = {one for one in self.captured.outputs if isinstance(one, fx.Node)}
            for node in before.outputs:
                if node not in yielded:
                    values.pop(node, None)  # of one that goes by groups of heads it is gone

    def _tiles(self, segment: Segment) -> Iterator[tuple[int, int, int]]:
        """(number, start, stop) of each tile."""
        tile = rows_tile(self.captured, segment, self.tokens, self.tile)
        for number, start in enumerate(range(0, self.tokens, tile)):
            yield number, start, min(start + tile, self.tokens)

    def _source(self, segment: Segment, node: fx.Node, values: Values, start: int, stop: int) -> torch.Tensor:
        """Rows of a source for one tile, without gaps in memory; a dropout mask is drawn."""
        axis = segment.axes[node]
        if node in values:
            whole: torch.Tensor = values[node]
            return whole if axis is None else packed(whole, axis, self.tokens, start, stop)
        return self._mask(node, axis, start, stop)

    def _borrowed(self, index: int, start: int) -> Iterator[torch.Tensor]:
        """What earlier segments chose for this tile, and segment ``index`` has to choose as well."""
        for node, owner, place in self.captured.once(_borrowed_by, index):
            yield from self.kept[owner, start][place : place + count_kept(node)]

    def _mask(self, node: fx.Node, axis: TokenAxis | None, start: int, stop: int) -> torch.Tensor:
        draw = next(draw for draw in self.captured.draws if draw.mask is node)
        shape = [int(self.captured.size(size, self.tokens)) for size in node.meta["val"].shape]
        if axis is not None:
            shape[axis.dim] = axis.outer * (stop - start) * axis.inner
        seed = mixed_seed(self.seed, draw.call, start)
        return bernoulli(shape, 1.0 - draw.drop, seed, node.meta["val"].device)

    def whole_mask(self, call: int) -> torch.Tensor:
        """The mask of the block's dropout number ``call``, put together from those of its tiles."""
        node = next(draw.mask for draw in self.captured.draws if draw.call == call)
        segments = (stage for stage in self.captured.stages.stages if isinstance(stage, Segment))
        segment = next(segment for segment in segments if node in segment.sources)
        axis = segment.axes[node]
        if axis is None:
            return self._mask(node, None, 0, self.tokens)
        parts = [self._mask(node, axis, start, stop) for _, start, stop in self._tiles(segment)]
        if axis.outer != 1 or axis.inner != 1:
            parts = [part.unflatten(axis.dim, (axis.outer, -1, axis.inner)) for part in parts]
            return torch.cat(parts, dim=axis.dim + 1).flatten(axis.dim, axis.dim + 2)
        return torch.cat(parts, dim=axis.dim)

    def attention_seed(self, number: int) -> int:
        """Seed of the dropout of attention number ``number``."""
        return self.mixing.attention_seed(number)

    def _segment_forward(
        self, index: int, segment: Segment, values: Values, *, keep: bool, part: HeadPart | None = None
    ) -> None:
        """Outputs of segment number ``index`` into ``values``; ``part``: of some of them these heads alone."""
        casts: tuple[torch.Tensor, ...] = ()
        for number, start, stop in self._tiles(segment):
            sources = [self._source(segment, node, values, start, stop) for node in segment.sources]
            sources.extend(self._borrowed(index, start))
            programs = self.programs.get(self.captured, index, sources, stop - start, self.autocast)
            if start == 0:
                casts = programs.casts(*sources)
                self._make_room(segment, programs, values, part, stop)
            sources.extend(casts)
            places, apart = self._places(segment, programs, values, part, (start, stop))
            if keep:
                kept = number < self.keep and not segment.by_rows
                made = list((programs.forward_keep if kept else programs.forward)(sources, places))
                if made or kept:
                    if self.products is not None and number >= self.keep - self.sent and made[programs.choices :]:
                        self.products.store(index, start, made[programs.choices :])
                        del made[programs.choices :]
                    self.kept[index, start] = made
                del made
            else:
                sources.extend(self.kept.get((index, start), ())[: programs.choices])
                programs.rebuild(sources, places)
                self.again_flops += programs.cost.forward
            for node, axis, result in apart:
                mine = result if part is None else part_of(result, node, part)
                if mine is not None:
                    write(values[node], axis, self.tokens, start, mine)
                del mine, result
            # Not alive while the next tile runs: they are as large as what a program takes itself.
            del sources, places, apart

    def _make_room(
        self, segment: Segment, programs: Programs, values: Values, part: HeadPart | None, length: int
    ) -> None:
        """Full-length memory for outputs of ``segment``, laid out as those of its first tile of ``length`` tokens."""
        for node, layout in zip(segment.outputs, programs.layouts, strict=True):
            axis, tile = segment.axes[node], layout if part is None else part_of(layout, node, part)
            assert axis is not None, "a segment yields values with tokens"
            if tile is not None:
                values[node] = like(tile, axis, self.tokens, length, self.device)

    def _places(
        self, segment: Segment, programs: Programs, values: Values, part: HeadPart | None, tile: tuple[int, int]
    ) -> tuple[list[torch.Tensor], list[tuple[fx.Node, TokenAxis, torch.Tensor]]]:
        """(where outputs of a tile are written; those of it that are copied from there to ``values``)."""
        places, apart = [], []
        for node, layout in zip(segment.outputs, programs.layouts, strict=True):
            axis = segment.axes[node]
            assert axis is not None, "a segment yields values with tokens"
            place = gapless_rows(values[node], axis, *tile) if part is None else None
            if place is None:
                place = gapless_like(layout, self.device)
                apart.append((node, axis, place))
            places.append(place)
        return places, apart

    # ---- backward

    def result_again(self, values: Values) -> torch.Tensor:
        """The block's result once more, by its last segment alone; ``values``: placeholders and the stash."""
        index = self.captured.once(result_stage)
        assert index is not None, "nothing is made again from a block that cannot"
        segment = self.captured.segment(index)
        with without_autocast(self.device.type):
            self._run_whole(self.captured.stages.weights, values)
            self._segment_forward(index, segment, values, keep=False)
        result: torch.Tensor = values[segment.outputs[0]]
        return result

    def backward(
        self,
        values: Values,
        grads: Sequence[torch.Tensor | None],
        sole: Collection[int] = (),
        entry: Entry | None = None,
    ) -> Gradients:
        """Gradients of all placeholders that want one.

        Args:
            values: placeholders and the stash. grads: of the outputs. sole: which of these nobody else can see.
            entry: what it has in host memory, and the way to what the block below has.
        """
        stages = self.captured.stages
        weights = self._weights(values)
        found = Gradients(stages.differentiable, self.tokens, self.captured.once(met_once))
        for node, grad in zip(self.captured.outputs, grads, strict=True):
            if isinstance(node, fx.Node) and grad is not None:
                found.add(node, grad)
        for node, result in self.captured.once(overwritten).items():
            place = self.captured.outputs.index(result)
            grad = grads[place]
            value = values[node]
            if grad is None:
                continue
            if grad.dtype != value.dtype or grad.stride() != value.stride():
                self.laid_otherwise = True
            elif place in sole:
                found.place(node, grad)
            else:
                self.held_elsewhere = True
        mixing = mixing_stages(stages.stages)
        if entry is not None and not mixing:
            entry.fetch_below()
            entry.fetch_products_below()
        for index in range(len(stages.stages) - 1, -1, -1):
            stage, how = stages.stages[index], self._grouping(index)
            if entry is not None and index + 1 == mixing.stop:
                entry.fetch_below()
            if how is None and (isinstance(stage, Mixer) or stage.by_rows) and not self.mixer_inputs:
                self._rebuild_inputs(index, values)
            if how is not None:
                make = partial(self._make_group, index - 1, how, values, keep=False)
                self.mixing.backward_by_groups(how, self.groups, values, found, make, retain=self.retain)
                self._drop_inputs(index, values)
            elif isinstance(stage, Mixer):
                self.mixing.backward(stage, values, found, retain=self.retain)
                self._drop_inputs(index, values)
            elif any(node in found for node in stage.outputs):
                self._segment_backward(index, stage, values, found)
                if stage.by_rows:
                    self._drop_inputs(index, values)
            if entry is not None and mixing and index == mixing.start:
                entry.fetch_products_below()
        self._weights_backward(weights, found)
        return found

    def _rebuild_inputs(self, index: int, values: Values) -> None:
        before = self.captured.stages.stages[index - 1] if index else None
        if isinstance(before, Segment) and not before.by_rows:
            self._segment_forward(index - 1, before, values, keep=False)

    def _segment_backward(self, index: int, segment: Segment, values: Values, found: Gradients) -> None:
        upstream = [found.take(node) for node in segment.outputs]
        absent = frozenset(number for number, grad in enumerate(upstream) if grad is None)
        casts: tuple[torch.Tensor, ...] = ()
        for number, start, stop in self._tiles(segment):
            if self.products is not None:
                self.products.fetch_from(index, start)
            sources = [self._source(segment, node, values, start, stop) for node in segment.sources]
            sources.extend(self._borrowed(index, start))
            programs = self.programs.get(self.captured, index, sources, stop - start, self.autocast)
            if start == 0:
                casts = programs.casts(*sources)
            sources.extend(casts)
            tangents = [
                tangent(layout, segment.axes[node], grad, tokens=self.tokens, tile=(start, stop), device=self.device)
                for node, grad, layout in zip(segment.outputs, upstream, programs.layouts, strict=True)
            ]
            kept = self.kept.get((index, start), []) if self.retain else self.kept.pop((index, start), [])
            kept = [*kept, *(self.products.take(index, start) if self.products is not None else ())]
            whole = number < self.keep and not segment.by_rows
            self.again_flops += programs.cost.again_kept if whole else programs.cost.again
            backward = programs.backward_kept if whole else programs.backward
            results = backward(*sources, *tangents, *kept)
            for source in found.in_order(segment.sources):
                node, place = segment.sources[source], programs.places[source]
                if place is not None and not (absent and programs.reached[source] <= absent):
                    found.add_tile(node, segment.axes[node], Part(place, results, start, stop), values[node])
            del sources, tangents, kept, results
            if self.products is not None:
                self.products.over(index, start, retain=self.retain)

    def _weights(self, values: Values) -> tuple[Values, Values]:
        """Values made from parameters, made again with a graph: (leaves, results)."""
        stages = self.captured.stages
        inside = set(stages.weights)
        leaves: Values = {}
        for node in stages.weights:
            for one in node.all_input_nodes:
                if one not in inside and isinstance(values.get(one), torch.Tensor):
                    leaves[one] = values[one].detach().requires_grad_(one in stages.differentiable)
        local: Values = dict(leaves)
        with torch.enable_grad(), self.autocast.uncached().restored():
            for node in stages.weights:
                local[node] = run_node(node, local, lambda size: self.captured.size(size, self.tokens))
        for node in stages.weights:
            value = local[node]
            values[node] = value.detach() if isinstance(value, torch.Tensor) else value
        return leaves, local

    def _weights_backward(self, weights: tuple[Values, Values], found: Gradients) -> None:
        leaves, results = weights
        pairs = []
        for node in self.captured.stages.weights:
            grad = found.take(node) if node in found else None
            if grad is not None and results[node].requires_grad:
                pairs.append((results[node], grad.to(results[node].dtype)))
        wanted = {node: leaf for node, leaf in leaves.items() if leaf.requires_grad}
        if pairs and wanted:
            outs, grads = zip(*pairs, strict=True)
            for node, grad in zip(
                wanted, torch.autograd.grad(outs, list(wanted.values()), grads, allow_unused=True), strict=True
            ):
                if grad is not None:
                    found.add(node, grad)
