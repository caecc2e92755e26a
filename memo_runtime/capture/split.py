"""The graph of a block cut into stages.

Every value belongs to one of these kinds:

    fixed      needs no gradient and is not computed token by token (masks, positions): computed once, at full length
    weight     made from parameters and arguments without tokens (a normalised weight, a position bias): computed once
    tile       computed token by token, so a tile of it needs only tiles: never held at full length across a cut
    mixed      the result of a mixer

and stages alternate: a segment computes the inputs of a mixer tile by tile, the mixer runs at full length. The last
segment computes what the block yields. A tile value that several segments need (the residual, a gate, a parallel MLP)
is computed again in each of them, from the stash: arguments of the block and results of mixers.

Attention that is written out as products and a softmax is a mixer too (``Segment.by_rows``): each row of scores needs
one query and all keys, so it goes through in tiles of queries with keys and values at full length.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree

from memo_runtime.blocks.operators import draws, is_registered_mixer
from memo_runtime.capture.axes import SQUARE, AxisTree, NotTokenWiseError, TokenSymbol, at
from memo_runtime.capture.flash import OPERATOR as FLASH
from memo_runtime.capture.functional import Draw
from memo_runtime.capture.rules import arguments_of, follow, operator_name
from memo_runtime.capture.trace import NEEDS_GRAD
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.records import TokenAxis

#: Operators whose arguments may be sizes; elsewhere a number of tokens would be a number in a formula.
_SIZED = (
    "reshape", "view", "expand", "flatten", "unflatten", "slice", "zeros", "ones", "full", "new_zeros", "new_ones",
    "new_full", "new_empty", "broadcast_to", "split", "split_with_sizes", "narrow",
)  # fmt: skip
PRODUCTS = ("aten.matmul", "aten.bmm", "aten.baddbmm")
MIXERS = ("aten.scaled_dot_product_attention",)
_TENSORS = ("query", "key", "value")
DROPOUT = "aten.dropout"


@dataclass(frozen=True, slots=True)
class Segment:
    """Operators that run tile by tile.

    Args:
        nodes: in order.
        sources: values from outside that they use.
        outputs: what is computed, all with tokens.
        axes: token axis of each source and output; None: used whole.
        by_rows: tiles are tiles of queries, and keys are used whole.
    """

    nodes: tuple[fx.Node, ...]
    sources: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    axes: Mapping[fx.Node, TokenAxis | None]
    by_rows: bool = False


@dataclass(frozen=True, slots=True)
class Mixer:
    """One operator that mixes tokens, run at full length."""

    node: fx.Node

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The tensors that it uses."""
        return tuple(one for one in self.node.all_input_nodes if isinstance(one.meta["val"], torch.Tensor))

    @property
    def by_graph(self) -> bool:
        """It is one that the user has named, and no attention that we know."""
        return operator_name(self.node) not in MIXERS

    @property
    def results(self) -> tuple[tuple[fx.Node, int], ...]:
        """(value, its number among what the operator yields) of all that is used."""
        if isinstance(self.node.meta["val"], torch.Tensor):
            return ((self.node, 0),)
        return tuple((user, int(user.args[1])) for user in self.node.users)  # type: ignore[arg-type]


Stage = Segment | Mixer


def mixed_values(stage: Stage) -> list[fx.Node]:
    """Values of ``stage`` that backward needs of forward: results of mixers."""
    if isinstance(stage, Mixer):
        return [node for node, _ in stage.results]
    return list(stage.outputs) if stage.by_rows else []


def mixer_inputs(stages: Sequence[Stage], outputs: Collection[Any]) -> list[fx.Node]:
    """What segments make for the mixer behind them (queries, keys, values); none if the block yields some of it."""
    found: list[fx.Node] = []
    for before, stage in pairwise(stages):
        mixes = isinstance(stage, Mixer) or stage.by_rows
        if mixes and isinstance(before, Segment) and not before.by_rows:
            found.extend(before.outputs)
    return [] if any(node in outputs for node in found) else list(dict.fromkeys(found))  # two mixers may share some


def mixing_stages(stages: Sequence[Stage]) -> range:
    """From the first stage that mixes tokens to behind the last; empty where none does."""
    found = [index for index, stage in enumerate(stages) if isinstance(stage, Mixer) or stage.by_rows]
    return range(found[0], found[-1] + 1) if found else range(0)


_Nodes = tuple[fx.Node, ...]


@dataclass(slots=True)
class Stages:
    """What runs when; see the module's docstring."""

    axes: dict[fx.Node, AxisTree] = field(default_factory=dict)
    differentiable: set[fx.Node] = field(default_factory=set)
    fixed: list[fx.Node] = field(default_factory=list)
    weights: list[fx.Node] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)


class _Splitter:
    def __init__(self, graph: fx.Graph, token: TokenSymbol, draws: Iterable[Draw]) -> None:
        self.graph = graph
        self.token = token
        self.out = Stages()
        self.axes = self.out.axes
        self.draws = {draw.mask for draw in draws}
        self.tile: set[fx.Node] = set()
        self.mixed: list[fx.Node] = []
        self.whole: set[fx.Node] = set()  # available at full length: arguments, fixed, weight
        self.row_axes: dict[fx.Node, AxisTree] = {}
        #: Values of which rows of scores take rows of their own, and the operator that does.
        self.row_source: dict[fx.Node, fx.Node] = {}

    # ---- one value

    def place(self, node: fx.Node) -> None:
        """Decide the kind of ``node``; its arguments have been placed."""
        value = node.meta.get("val")
        if node.op == "placeholder":
            self._place_argument(node)
            return
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
            return
        sources = [one for one in node.all_input_nodes if one in self.axes]
        if _needs_gradient(node, sources, self.out.differentiable):
            self.out.differentiable.add(node)
        member: Any = node.args[0] if operator_name(node) == "getitem" else None
        if member in self.mixed:
            members: Any = self.axes[member]
            self.axes[node] = members[node.args[1]]
            self.mixed.append(node)
        elif any(one in self.row_axes for one in sources):
            self._place_row(node)
        elif not any(one in self.tile or one in self.mixed or self._is_moving(one) for one in sources):
            self._place_whole(node)
        else:
            self._place_tile(node)

    def _place_argument(self, node: fx.Node) -> None:
        self.axes[node] = self._plain(node)
        if node in self.draws:
            self._place_draw(node)
            return
        self.whole.add(node)
        if node.meta[NEEDS_GRAD]:
            self.out.differentiable.add(node)

    def _place_draw(self, node: fx.Node) -> None:
        """A dropout mask: drawn for each tile, or for rows of scores."""
        axis = self.axes[node]
        if axis is SQUARE:
            self.row_axes[node] = at(node.meta["val"].dim() - 2)
        elif axis is None:
            raise CaptureRefusedError(DROPOUT, "it drops elements of a value without tokens")

    def _is_moving(self, node: fx.Node) -> bool:
        """An argument with one token dimension, which tiles take their rows of."""
        return node.op == "placeholder" and isinstance(self.axes[node], TokenAxis)

    def _plain(self, node: fx.Node) -> AxisTree:
        value = node.meta["val"]
        try:
            if isinstance(value, (list, tuple)):
                return tuple(self.token.plain_axis(one) for one in value)
            return self.token.plain_axis(value)
        except NotTokenWiseError as error:
            name = DROPOUT if node in self.draws else operator_name(node)
            raise CaptureRefusedError(name, str(error)) from error

    def _place_whole(self, node: fx.Node) -> None:
        self.axes[node] = self._plain(node)
        self.whole.add(node)
        weight = node in self.out.differentiable
        if not weight and any(one in self.out.weights for one in node.all_input_nodes):
            weight = True
        (self.out.weights if weight else self.out.fixed).append(node)

    def _place_tile(self, node: fx.Node) -> None:
        if _is_by_graph(node):
            self._place_mixing(node, "it was named as one that mixes tokens")
            return
        try:
            axis = follow(node, self.axes, self.token)
            self._check(node, axis)
            self._check_sizes(node)
        except NotTokenWiseError as error:
            self._place_mixing(node, str(error))
            return
        self.axes[node] = axis
        self.tile.add(node)

    def _check(self, node: fx.Node, axis: AxisTree) -> None:
        value = node.meta["val"]
        pairs = zip(value, axis, strict=True) if isinstance(axis, tuple) else [(value, axis)]
        for one, its in pairs:
            self.token.check(one, its)

    def _check_sizes(self, node: fx.Node) -> None:
        sizes = [one.meta["val"] for one in node.all_input_nodes if one not in self.axes]
        growing = [size for size in sizes if self.token.grows(size)]
        if growing and operator_name(node).removeprefix("aten.") not in _SIZED:
            raise NotTokenWiseError("the number of tokens is part of its formula")
        for size in growing:
            self.token.factor(size)

    # ---- values that need more than one token

    def _place_mixing(self, node: fx.Node, reason: str) -> None:
        name = operator_name(node)
        if name in MIXERS:
            self._place_attention(node, reason)
        elif node not in self.out.differentiable and self._at_full_length(node):
            self.axes[node] = self._plain(node)
            self.whole.add(node)
        elif _is_by_graph(node):
            self._place_registered(node)
        elif name in PRODUCTS and len(self.token.dims(node.meta["val"])) == 2:
            self._start_rows(node, reason)
        else:
            raise CaptureRefusedError(name, reason)

    def _at_full_length(self, node: fx.Node) -> bool:
        """Compute ``node``, which needs no gradient, and what it is made from before the tiles; False: it cannot be."""
        needed: list[fx.Node] = []
        pending = [node]
        while pending:
            one = pending.pop()
            if one in self.mixed or one in self.row_axes or one in self.draws or one in self.out.weights:
                return False
            if one in needed or one in self.whole or (one not in self.axes and one is not node):
                continue
            needed.append(one)
            pending.extend(one.all_input_nodes)
        order = {one: index for index, one in enumerate(self.graph.nodes)}
        known = set(self.out.fixed)
        self.out.fixed.extend(sorted((one for one in needed if one not in known), key=order.__getitem__))
        return True

    def _place_attention(self, node: fx.Node, reason: str) -> None:
        named = arguments_of(node)
        shapes = [[self.token.text(size) for size in named[name].meta["val"].shape] for name in _TENSORS]
        if not _is_of_kernels(*shapes):
            texts = ", ".join(f"{name} [{', '.join(shape)}]" for name, shape in zip(_TENSORS, shapes, strict=True))
            text = f"fused kernels take [batch, heads, tokens, size] of one batch, and it is given {texts}"
            raise CaptureRefusedError(operator_name(node), text)
        # Of other tokens than the queries, which are as many in every call of this kind.
        others = self.axes[named["key"]] is None and self.axes[named["value"]] is None and not named["is_causal"]
        for name in _TENSORS[:1] if others else _TENSORS:
            axis = self.axes[named[name]]
            count = named[name].meta["val"].dim()
            if not isinstance(axis, TokenAxis) or axis.dim != count - 2 or axis.outer * axis.inner != 1:
                text = f"{reason}, and its {name} has no tokens in its last dimension but one"
                raise CaptureRefusedError(operator_name(node), text)
        self.axes[node] = self.axes[named["query"]]
        self.mixed.append(node)
        self._start_stage(Mixer(node))

    def _place_registered(self, node: fx.Node) -> None:
        """An operator that the user has named: it runs at full length, and backward by its own formula."""
        if draws(str(node.target)):
            raise CaptureRefusedError(operator_name(node), "it is a mixer that draws random numbers")
        if any(one in self.row_axes for one in node.all_input_nodes):
            raise CaptureRefusedError(operator_name(node), "it uses scores of attention")
        self.axes[node] = self._plain(node)
        self.mixed.append(node)
        self._start_stage(Mixer(node))

    def _start_rows(self, node: fx.Node, reason: str) -> None:
        """``node`` makes the scores of attention: a row for each query."""
        left = arguments_of(node)["batch1" if operator_name(node) == "aten.baddbmm" else "self"]
        axis, value = self.axes[left], left.meta["val"]
        if not isinstance(axis, TokenAxis) or axis.dim != value.dim() - 2 or axis.outer * axis.inner != 1:
            raise CaptureRefusedError(operator_name(node), reason)
        self.row_source[left] = node
        self._place_row(node, left)

    def _place_row(self, node: fx.Node, left: fx.Node | None = None) -> None:
        """A value of attention that is written out: follow the queries, with keys at full length."""
        axes: dict[fx.Node, AxisTree] = {}
        for one in node.all_input_nodes:
            if one not in self.axes:
                raise CaptureRefusedError(operator_name(node), "a size is used between products of attention")
            axes[one] = self.row_axes.get(one) or self._row_axis_of(one, moving=one is left)
        axis = self._follow_row(node, axes)
        value: Any = node.meta["val"]
        for one, its in zip(value, axis, strict=True) if isinstance(axis, tuple) else [(value, axis)]:
            dims = self.token.dims(one) if isinstance(one, torch.Tensor) else []
            if not isinstance(its, TokenAxis) or its.dim not in dims or its.outer * its.inner != 1:
                raise CaptureRefusedError(operator_name(node), "queries cannot be followed through it")
        self.row_axes[node] = axis
        if isinstance(axis, TokenAxis) and len(self.token.dims(value)) > 1:
            self.axes[node] = SQUARE
            return
        self.axes[node] = axis
        if isinstance(axis, TokenAxis) and not self._meets_scores(node):
            self._close_rows(node, axis)

    def _follow_row(self, node: fx.Node, axes: dict[fx.Node, AxisTree]) -> AxisTree:
        """Axis of a value of attention that is written out; what else has tokens is used whole, or by rows too."""
        try:
            return follow(node, axes, self.token)
        except NotTokenWiseError as error:
            refusal = CaptureRefusedError(operator_name(node), f"in attention that is written out: {error}")
            refusal.__cause__ = error
        others = [one for one, axis in axes.items() if axis is None and isinstance(self.axes[one], TokenAxis)]
        try:
            found = follow(node, axes | {one: self.axes[one] for one in others}, self.token)
        except NotTokenWiseError:
            raise refusal from refusal.__cause__
        self.row_source |= dict.fromkeys(others, node)
        return found

    def _meets_scores(self, node: fx.Node) -> bool:
        """A number for each row of scores that goes back to them, as the largest one, which a softmax subtracts."""
        return any(one in self.row_axes for user in node.users for one in user.all_input_nodes if one is not node)

    def _row_axis_of(self, node: fx.Node, *, moving: bool) -> AxisTree:
        if moving:
            return self.axes[node]
        value = node.meta["val"]
        if self.axes[node] is SQUARE and value.dim() >= 2 and self.token.grows(value.shape[-2]):
            return at(value.dim() - 2)
        return None

    def _close_rows(self, node: fx.Node, axis: TokenAxis) -> None:
        """The product with the values is over: everything since the scores is one stage."""
        inside, sources = self._walk([node], set(self.row_axes) | {node})
        rows: dict[fx.Node, TokenAxis | None] = {}
        for one in sources:
            if one in self.row_source and _used_whole(one, self.row_source[one], inside):
                raise CaptureRefusedError(operator_name(node), "its queries are its keys or values too, as one tensor")
            found = self.axes[one] if one in self.row_source else self._row_axis_of(one, moving=False)
            rows[one] = found if isinstance(found, TokenAxis) else None
        if not any(one in self.row_source for one in sources):
            raise CaptureRefusedError(operator_name(node), "queries cannot be followed through it")
        del self.row_axes[node]
        self.mixed.append(node)
        self._start_stage(Segment(inside, sources, (node,), rows | {node: axis}, by_rows=True))

    # ---- stages

    def _walk(self, outputs: Iterable[fx.Node], inside: set[fx.Node]) -> tuple[_Nodes, _Nodes]:
        """(operators inside, in order; values from outside) that make ``outputs``."""
        seen: set[fx.Node] = set()
        pending = list(outputs)
        while pending:
            one = pending.pop()
            if one in seen or one not in self.axes:
                continue
            seen.add(one)
            if one in inside and one.op != "placeholder":
                pending.extend(one.all_input_nodes)
        nodes = [one for one in self.graph.nodes if one in seen]
        within = tuple(one for one in nodes if one in inside and one.op != "placeholder")
        return within, tuple(one for one in nodes if one not in within)

    def segment(self, outputs: Iterable[fx.Node]) -> Segment | None:
        """The segment that computes those of ``outputs`` which are not at hand."""
        wanted = tuple(dict.fromkeys(one for one in outputs if one in self.tile and one not in self.whole))
        if not wanted:
            return None
        nodes, sources = self._walk(wanted, self.tile - self.whole)
        axes: dict[fx.Node, TokenAxis | None] = {}
        for one in (*sources, *wanted):
            axis = self.axes[one]
            if axis is SQUARE:
                raise CaptureRefusedError(operator_name(one), "a value with two token dimensions is used by tiles")
            axes[one] = axis if isinstance(axis, TokenAxis) else None
        return Segment(nodes, sources, wanted, axes)

    def _start_stage(self, stage: Stage) -> None:
        before = self.segment(stage.inputs if isinstance(stage, Mixer) else stage.sources)
        self.out.stages.extend([before, stage] if before is not None else [stage])


def _is_of_kernels(query: Sequence[str], key: Sequence[str], value: Sequence[str]) -> bool:
    """Kernels do not ask, and of keys of fewer sequences or heads they read what lies behind them."""
    if not len(query) == len(key) == len(value) == 4 or not query[0] == key[0] == value[0] or key[1] != value[1]:
        return False
    return query[1] == key[1] or (query[1].isdecimal() and key[1].isdecimal() and int(query[1]) % int(key[1]) == 0)


def _is_by_graph(node: fx.Node) -> bool:
    """A mixer that runs at full length through autograd's own graph: the user has named it, or it is flash-attn's."""
    return is_registered_mixer(str(node.target)) or operator_name(node) == FLASH


def _used_whole(queries: fx.Node, scores: fx.Node, inside: Collection[fx.Node]) -> bool:
    """Attention also uses ``queries``, of which tiles are rows, where all tokens are needed."""
    return any(user in inside for user in queries.users if user is not scores) or list(scores.args).count(queries) > 1


def _needs_gradient(node: fx.Node, sources: list[fx.Node], differentiable: set[fx.Node]) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    floating = any(isinstance(one, torch.Tensor) and (one.is_floating_point() or one.is_complex()) for one in values)
    return floating and operator_name(node) != "aten.detach" and any(one in differentiable for one in sources)


def split(graph: fx.Graph, token: TokenSymbol, draws: Iterable[Draw]) -> Stages:
    """Cut ``graph`` into stages.

    Raises:
        CaptureRefusedError: an operator mixes tokens and is no mixer that can be cut out; names it. Or there is none.
    """
    splitter = _Splitter(graph, token, draws)
    (output,) = (node for node in graph.nodes if node.op == "output")
    for node in graph.nodes:
        if node is not output:
            splitter.place(node)
    yielded = [leaf for leaf in _pytree.tree_leaves(output.args) if isinstance(leaf, fx.Node)]
    for node in yielded:
        if isinstance(node.meta["val"], torch.Tensor) and node not in splitter.whole and node in splitter.row_axes:
            raise CaptureRefusedError(operator_name(node), "scores of attention are yielded")
    last = splitter.segment(yielded)
    if last is not None:
        splitter.out.stages.append(last)
    if not splitter.out.stages:
        raise CaptureRefusedError("output", "nothing that the block yields is made in it")
    return splitter.out
