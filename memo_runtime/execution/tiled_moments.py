"""What of a block is alive while it runs by tiles: the schedule of ``tiled_run`` walked without running.

Counted is what a block holds beside its stash (inputs, results of attention, log-sum-exps) and beside its parameters:

    forward    mixer: its inputs | segment: the inputs of the next mixer, or what the block yields
    backward   the gradients that came, and
               segment: those that it makes | mixer: queries, keys, values and their gradients, and that of its result

Gradients that are written over those that came (``tiled_overwrite.py``) are counted once. For a block of one attention
the worst moment is the backward of that attention, unless many products are kept: beside x and o there are dx over dy,
do, q, k, v, dq, dk, dv: seven tensors as long and as wide as x where keys and values have a quarter of the heads.

By groups of heads (``tiled_mixing.py``) queries, keys, values and their gradients are those of one group, and gradients
of all heads lie over what was read: x, o, dx and do are left, and a group's part of the rest.

Products that are kept come and go with the tile that they belong to, and gradients of full length are made when the
first tile has been run, so a segment has a moment for each of these tiles (``memo_runtime/moments.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from memo_runtime.capture.captured import Captured
from memo_runtime.capture.rules import arguments_of
from memo_runtime.capture.split import Mixer, Segment, mixed_values, mixing_stages
from memo_runtime.execution.tiled_chain import result_stage
from memo_runtime.execution.tiled_costs import ProgramBytes, tensor_bytes
from memo_runtime.execution.tiled_gradients import met_once, sum_dtype
from memo_runtime.execution.tiled_growth import polynomial
from memo_runtime.execution.tiled_heads import Grouping, grouping
from memo_runtime.execution.tiled_overwrite import overwritten, sole_holders
from memo_runtime.execution.tiled_programs import Cost
from memo_runtime.records import Growth, Moment, Stretch, TileAt, TokenAxis

#: Bytes by tokens that attention takes beside its tensors: (forward, backward).
Workspace = tuple[float, float]


@dataclass(slots=True)
class Needs:
    """What the walk is told about the parts of a block.

    Args:
        costs: of each segment's programs, by stage: at a tile, and at one of twice its tokens.
        alone: the same where that tile holds all tokens. tile: tokens of the smaller one.
        workspaces: of each mixer. saved: by the first result of each, bytes by token that its forward leaves
            beside its results. merging: of a mixer that takes queries in chunks, bytes while two parts are merged.
        weights: of the backward through what is made of parameters, by tokens.
    """

    costs: Mapping[int, tuple[Cost, Cost]]
    alone: Mapping[int, tuple[Cost, Cost]]
    tile: int
    workspaces: Mapping[fx.Node, Workspace]
    saved: Mapping[fx.Node, float]
    merging: Mapping[fx.Node, int] = field(default_factory=dict)
    weights: Growth = field(default_factory=Growth)


#: Of what one program takes, the figure of one moment.
_Part = Callable[[ProgramBytes], int]
#: While a program of the first tile is at work; when it is over, and while one of a later tile is at work: which tile
#: that is with nothing kept and with products kept, and what is counted of its program.
_FIRST: tuple[tuple[TileAt, _Part], ...] = (
    (TileAt.FIRST_BARE, lambda one: one.bare), (TileAt.FIRST_KEPT, lambda one: one.kept),
)  # fmt: skip
_REST: tuple[tuple[TileAt, _Part], ...] = (
    (TileAt.FIRST_BARE, lambda one: one.bare_results), (TileAt.FIRST_KEPT, lambda one: one.kept_results),
    (TileAt.LATER_BARE, lambda one: one.bare), (TileAt.LATER_KEPT, lambda one: one.kept),
)  # fmt: skip
#: The same of a segment that keeps nothing, however long a tile is.
_WHICHEVER: tuple[tuple[TileAt, _Part], ...] = ((TileAt.ANY, lambda one: one.bare),)


@dataclass(slots=True)
class _Walk:
    """``alive``: values by name, with the element bytes that are counted for them. ``to_come``: of the stash.

    ``grouped``: mixers that run by groups of heads, by stage; ``parts``: names of values of which one group is alive.
    ``rebuilding``: the products of the segment at hand are there, and are not what it makes. ``stays``: what mixers are
    given, where it is part of the stash. ``beside``: bytes by token of what belongs to values and is none.
    """

    captured: Captured
    needs: Needs
    tokens: int
    over: Mapping[fx.Node, fx.Node]
    grouped: Mapping[int, Grouping]
    parts: set[str] = field(default_factory=set)
    alive: dict[str, tuple[fx.Node, int]] = field(default_factory=dict)
    to_come: list[fx.Node] = field(default_factory=list)
    fixed: int = 0
    narrow: int = 0
    beside: float = 0.0
    rebuilding: bool = False
    stays: Collection[fx.Node] = ()
    stretch: Stretch = Stretch.MIDDLE
    moments: list[Moment] = field(default_factory=list)

    def add(self, kind: str, node: fx.Node, dtype: torch.dtype | None = None, *, part: bool = False) -> None:
        """``node``'s value (or its gradient: ``kind``) is there from now on; ``part``: of one group of heads."""
        name = f"{kind} {node.name}"
        self.alive.setdefault(name, (node, (dtype or node.meta["val"].dtype).itemsize))
        if part:
            self.parts.add(name)

    def drop(self, kind: str, nodes: Iterable[fx.Node]) -> None:
        """They are gone."""
        for node in nodes:
            self.alive.pop(f"{kind} {node.name}", None)
            self.parts.discard(f"{kind} {node.name}")

    def look(
        self, index: int, *, extra: float = 0.0, more: int = 0, less: int = 0, part: Growth | None = None,
        whole: Growth | None = None,
    ) -> None:  # fmt: skip
        """Note a moment of stage number ``index`` at which no tile runs.

        ``extra``: more bytes by token; ``whole``: by tokens, and ``part``: of all groups of heads. ``less``: of
        ``more``, what is not there where one tile holds all tokens.
        """
        self._note(index, TileAt.ANY, Growth(), extra=extra, more=more, less=less, part=part, whole=whole)

    def look_at(
        self, index: int, tiles: Iterable[tuple[TileAt, _Part]], *, backward: bool, apart: bool = False
    ) -> None:
        """Note the moments of ``tiles`` of segment number ``index``.

        ``backward``: of its programs, those. ``apart``: results of a tile are in memory of their own first.
        """
        costs, alone = self.needs.costs[index], self.needs.alone[index]
        for at, part in tiles:
            def taken(cost: Cost, part: _Part = part) -> int:
                return part(cost.backward_bytes) if backward else part(cost.forward_bytes) + apart * cost.output_bytes

            first, second = map(taken, costs)
            per_token = max(0.0, (second - first) / self.needs.tile)
            tile = Growth(constant=max(0.0, first - per_token * self.needs.tile), linear=per_token)
            copies = Growth(linear=max(0, first - taken(alone[0])) / self.needs.tile)
            self._note(index, at, tile, more=costs[0].cast_bytes, alone=copies)

    def _note(
        self, index: int, at: TileAt, tile: Growth, *, extra: float = 0.0, more: int = 0, less: int = 0,
        part: Growth | None = None, whole: Growth | None = None, alone: Growth | None = None,
    ) -> None:  # fmt: skip
        def held(tokens: int, *, parts: bool) -> float:
            sizes = (item * self.captured.size(node.meta["val"].numel(), tokens)
                     for name, (node, item) in self.alive.items() if (name in self.parts) is parts)  # fmt: skip
            return float(sum(sizes))

        def full(tokens: int) -> float:
            more_of_it = whole.exact(tokens) if whole is not None else 0.0
            return held(tokens, parts=False) + (extra + self.beside) * tokens + more_of_it

        def group(tokens: int) -> float:
            return held(tokens, parts=True) + (part.exact(tokens) if part is not None else 0.0)

        below = sum(self._products(stage) for stage in range(index + self.rebuilding))
        own = 0.0 if at is TileAt.ANY else self._products(index)
        self.moments.append(
            Moment(
                full=polynomial(full, self.tokens), tile=tile, fixed=self.fixed + more, at=at,
                part=polynomial(group, self.tokens),
                missing=polynomial(self._missing, self.tokens), kept=Growth(linear=below), own=Growth(linear=own),
                stretch=self.stretch, narrow=self.narrow + less, alone=alone or Growth(),
            )
        )  # fmt: skip

    def _products(self, index: int) -> float:
        """Bytes by kept token of the products of stage number ``index``."""
        stage = self.captured.stages.stages[index]
        if isinstance(stage, Mixer) or stage.by_rows:
            return 0.0
        return self.needs.costs[index][0].product_bytes / self.needs.tile

    def _missing(self, tokens: int) -> float:
        """Bytes of the results of mixers that are still to come."""
        sizes = 0.0
        for node in self.to_come:
            value = node.meta["val"]
            sizes += value.dtype.itemsize * self.captured.size(value.numel(), tokens)
            sizes += self.needs.saved.get(node, 0.0) * tokens
        return sizes

    # ---- the schedule

    def feeds(self, index: int) -> Segment | None:
        """The segment that computes the inputs of stage ``index``."""
        before = self.captured.stages.stages[index - 1] if index else None
        return before if isinstance(before, Segment) and not before.by_rows else None

    def dropped(self, segment: Segment) -> list[fx.Node]:
        """What of it is dropped once the mixer behind it has run."""
        return [node for node in segment.outputs if node not in self.captured.outputs]

    def forward(self) -> None:
        """As ``Run.forward``."""
        if self.captured.goes_backward:
            self.to_come = [*stashed_results(self.captured), *self.stays]
        else:
            self._hold_input()
        for index, stage in enumerate(self.captured.stages.stages):
            before = self.feeds(index)
            if index in self.grouped:
                self._forward_by_groups(index, self.grouped[index])
            elif isinstance(stage, Mixer):
                self._made(mixed_values(stage))
                more = self.needs.merging.get(stage.node, 0)
                self.look(index, extra=self.needs.workspaces[stage.node][0], more=more)
            elif stage.by_rows:
                self._made(stage.outputs)
                self.look_at(index, _WHICHEVER, backward=False)
            else:
                if index + 1 not in self.grouped:
                    self._segment_forward(index, stage, frozenset())
                continue
            if before is not None:
                self.drop("value", self.dropped(before))

    def _segment_forward(self, index: int, segment: Segment, sliced: Collection[fx.Node]) -> None:
        self._made([node for node in segment.outputs if node in self.stays])
        for node in segment.outputs:
            if node not in self.stays:
                self.add("value", node, part=node in sliced)
        self.look_at(index, (*_FIRST, *_REST), backward=False, apart=bool(sliced))

    def _forward_by_groups(self, index: int, how: Grouping) -> None:
        """The first group, whose tiles keep products, and any other, which finds these and the result there."""
        node, result = how.mixer.node, how.result
        self._segment_forward(index - 1, how.segment, how.sliced)
        self._made(mixed_values(how.mixer))
        self.add("part", result, part=True)
        more = self.needs.merging.get(node, 0)
        self.look(index, part=Growth(constant=more, linear=self.needs.workspaces[node][0] + self.needs.saved[result]))
        self.drop("part", [result])
        self.drop("value", how.sliced)
        self._rebuild(index - 1, how.segment, how.sliced)

    def _hold_input(self) -> None:
        """Without a backward nothing is stashed: what else would be is there as long as the forward."""
        given = (node for node, leaf in self.captured.arguments if leaf == self.captured.input_leaf)
        self._hold((*given, *self.captured.stages.fixed))
        self.beside = sum(costs[0].choice_bytes / self.needs.tile for costs in self.needs.costs.values())

    def _made(self, nodes: Collection[fx.Node]) -> None:
        self.to_come = [one for one in self.to_come if one not in nodes]
        if not self.captured.goes_backward:
            self._hold(nodes)
            self.beside += sum(self.needs.saved.get(node, 0.0) for node in nodes)

    def _hold(self, nodes: Iterable[fx.Node]) -> None:
        for node in one_of_each(nodes):
            self.add("value", node)

    def backward(self) -> None:
        """As ``Run.backward``: what came stays to the end, since its owner holds it."""
        stages = self.captured.stages
        mixing = mixing_stages(stages.stages)
        for node in self.captured.outputs:
            if isinstance(node, fx.Node) and node in stages.differentiable:
                self.add("given gradient", node)
        for index in range(len(stages.stages) - 1, -1, -1):
            stage = stages.stages[index]
            self.stretch = stretch_of(index, mixing)
            before = self.feeds(index) if isinstance(stage, Mixer) or stage.by_rows else None
            if before is not None and index not in self.grouped and not self.stays:
                self._rebuild(index - 1, before, frozenset())
            if index in self.grouped:
                self._backward_by_groups(index, self.grouped[index])
            elif isinstance(stage, Mixer):
                self._mixer_backward(index, stage)
            else:
                self._segment_backward(index, stage)
            if before is not None:
                self.drop("value", self.dropped(before))
        self.stretch = Stretch.LATE
        once = self.captured.once(met_once)
        rounding = self._rounding(())
        self.look(0, whole=self.needs.weights)
        self.look(0, more=rounding, less=rounding - self._rounding(once))

    def _rebuild(self, index: int, segment: Segment, sliced: Collection[fx.Node]) -> None:
        self.rebuilding = True
        for node in segment.outputs:
            self.add("value", node, part=node in sliced)
        self.look_at(index, _WHICHEVER, backward=False, apart=bool(sliced))
        self.rebuilding = False

    def result(self, index: int) -> None:
        """As ``Run.result_again``, for the block above: the gradient of its result is there, and as large as this."""
        (node,) = (one for one in self.captured.outputs if isinstance(one, fx.Node))
        self.add("given gradient", node)
        # What is made is counted as what the block above has not stashed.
        self.look_at(index, _WHICHEVER, backward=False)

    def _rounding(self, rounded_before: Collection[fx.Node]) -> int:
        """Most bytes that gradients of weights take more while each is rounded from the precision of its sum."""
        more = most = 0
        for node, _ in self.captured.states:
            value = node.meta["val"]
            if f"gradient {node.name}" not in self.alive or node in rounded_before:
                continue
            if sum_dtype(value.dtype) != value.dtype:
                rounded = int(value.numel()) * value.dtype.itemsize
                most = max(most, more + rounded)
                more += rounded - int(value.numel()) * sum_dtype(value.dtype).itemsize
        return most

    def _mixer_backward(self, index: int, mixer: Mixer) -> None:
        for node in mixer.inputs:
            if node in self.captured.stages.differentiable:
                self.add("gradient", node)
        again = [] if mixer.by_graph else _given_again(arguments_of(mixer.node))
        for name, node in again:
            self.add(f"gradient as {name}", node)
        self.look(index, extra=self.needs.workspaces[mixer.node][1])
        self._sum(index, again)
        self.drop("gradient", [node for node, _ in mixer.results])

    def _sum(self, index: int, again: Sequence[tuple[str, fx.Node]]) -> None:
        """Add gradients of one value, which all are there, in memory of their own; then only their sum is."""
        if not again:
            return
        for _, node in again:
            self.add("sum of gradients", node)
        self.look(index)
        for name, node in again:
            self.drop(f"gradient as {name}", [node])
            self.drop("sum of gradients", [node])

    def _backward_by_groups(self, index: int, how: Grouping) -> None:
        """The first group, which makes room for gradients that lie over nothing, and any other, which finds it there.

        Of the result and of its gradient the kernel gets a group's part without gaps, and writes to memory of its own.
        """
        node, result = how.mixer.node, how.result
        named = arguments_of(node)
        given = {name: named[name] for name in ("query", "key", "value")}
        over = {*how.over_result, *(["query"] if how.over_gradient else [])}
        self._rebuild(index - 1, how.segment, how.sliced)
        again = _given_again(given)
        for name, one in given.items():
            self.add("made gradient", one, part=True)
            if name not in over:
                self.add("gradient", one)
        for name, one in again:
            self.add(f"made gradient as {name}", one, part=True)
            self.add(f"gradient as {name}", one)
        for kind in ("part", "part of gradient"):
            self.add(kind, result, part=True)
        self.look(index, part=Growth(linear=self.needs.workspaces[node][1] + self.needs.saved[result]))
        self.drop("made gradient", given.values())
        for name, one in again:
            self.drop(f"made gradient as {name}", [one])
        for kind in ("part", "part of gradient"):
            self.drop(kind, [result])
        self.drop("value", how.sliced)
        self._rebuild(index - 1, how.segment, how.sliced)
        self.drop("value", how.sliced)
        self._sum(index, again)
        self.drop("gradient", [result])
        if how.over_gradient:
            self.add("gradient", given["query"])

    def _segment_backward(self, index: int, segment: Segment) -> None:
        wanted = self.captured.stages.differentiable
        self.look_at(index, _WHICHEVER if segment.by_rows else _FIRST, backward=True)
        for node in segment.sources:
            if node not in wanted:
                continue
            dtype = sum_dtype(node.meta["val"].dtype)
            if segment.axes[node] is not None:
                if node not in self.over:
                    self.add("gradient", node)
            elif self.captured.traced.token.dims(node.meta["val"]):
                self.add("gradient", node, dtype)
            elif f"gradient {node.name}" not in self.alive:
                self.alive[f"gradient {node.name}"] = (node, 0)
                value = node.meta["val"]
                self.fixed += int(value.numel()) * dtype.itemsize
                if node in self.captured.once(met_once):
                    self.narrow += int(value.numel()) * (dtype.itemsize - value.dtype.itemsize)
        self.look_at(index, _WHICHEVER if segment.by_rows else _REST, backward=True)
        self.drop("gradient", segment.outputs)


def _given_again(named: Mapping[str, fx.Node]) -> list[tuple[str, fx.Node]]:
    """Arguments of an attention, by name, that are another one of it too: a kernel makes a gradient for each."""
    names = [name for name in ("query", "key", "value") if name in named]
    return [(name, named[name]) for at, name in enumerate(names) if named[name] in map(named.get, names[:at])]


def stretch_of(index: int, mixing: range) -> Stretch:
    """That of stage number ``index`` in backward, where those of ``mixing`` mix tokens."""
    if not mixing or index < mixing.start:
        return Stretch.LATE
    return Stretch.MIDDLE if index in mixing else Stretch.EARLY


def results_of_mixers(captured: Captured) -> list[fx.Node]:
    """Values made in forward that backward needs whole."""
    return [node for stage in captured.stages.stages for node in mixed_values(stage)]


def stashed_results(captured: Captured) -> list[fx.Node]:
    """Those of them that may go to the host."""
    stages = captured.stages
    found = results_of_mixers(captured)
    return [node for node in found if node in stages.differentiable and isinstance(stages.axes[node], TokenAxis)]


def moments(
    captured: Captured, needs: Needs, tokens: int, *, by_groups: bool = False, stays: Collection[fx.Node] = ()
) -> tuple[tuple[Moment, ...], tuple[Moment, ...]]:
    """(those of forward, those of backward), for sequences of ``tokens`` and longer.

    ``by_groups``: of heads. ``stays``: what mixers are given, where that is part of the stash.
    """
    device = captured.arguments[0][0].meta["val"].device
    over = overwritten(captured) if sole_holders(device.type) is not None else {}
    found = {index: grouping(captured, index) for index in range(len(captured.stages.stages) if by_groups else 0)}
    grouped = {index: how for index, how in found.items() if how is not None}
    forward, backward = (_start(captured, needs, tokens, over, grouped) for _ in range(2))
    forward.stays = backward.stays = stays
    forward.forward()
    if captured.goes_backward:
        backward.backward()
    return tuple(forward.moments), tuple(backward.moments)


def result_moments(captured: Captured, needs: Needs, tokens: int) -> tuple[Moment, ...]:
    """Those of making the block's result again from its stash; none if it cannot be."""
    index = result_stage(captured)
    if index is None:
        return ()
    walk = _start(captured, needs, tokens, {}, {})
    walk.rebuilding = True
    walk.result(index)
    return tuple(walk.moments)


def _start(
    captured: Captured, needs: Needs, tokens: int, over: Mapping[fx.Node, fx.Node], grouped: Mapping[int, Grouping]
) -> _Walk:
    """A walk that finds what a block makes of its parameters, once for each call."""
    walk = _Walk(captured, needs, tokens, over, grouped)
    given = {storage_key(node) for node, _ in captured.states}
    tensors = (node for node in captured.stages.weights if isinstance(node.meta["val"], torch.Tensor))
    for node in {storage_key(node): node for node in tensors if storage_key(node) not in given}.values():
        # One that grows with tokens must not be asked for its bytes: its capture would hold for one length only.
        if captured.traced.token.dims(node.meta["val"]):
            walk.add("made of parameters", node)
        else:
            walk.fixed += tensor_bytes(node.meta["val"])
    return walk


def storage_key(node: fx.Node) -> int:
    """Equal for values in the same memory."""
    return int(node.meta["val"].untyped_storage()._cdata)


def one_of_each(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Of ``nodes`` that are tensors, the first in each memory: those behind it are views of it."""
    found: dict[int, fx.Node] = {}
    for node in nodes:
        if isinstance(node.meta["val"], torch.Tensor):
            found.setdefault(storage_key(node), node)
    return list(found.values())
