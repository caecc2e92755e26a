"""What operators do to the token dimension: the proof that a tile can be computed alone.

``follow`` takes the axes of an operator's arguments and yields those of its results, or raises with the reason why
the operator's result for one token depends on other tokens. An operator that is not known here is not followed. What
the rules derive is compared with the symbolic shapes by the caller, so a rule that is wrong about a dimension shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from memo_runtime.capture.axes import SQUARE, Axis, AxisTree, NotTokenWiseError, TokenSymbol, at, reshaped
from memo_runtime.capture.declared import DECLARED, OPERATOR
from memo_runtime.capture.einsum import einsum_axis
from memo_runtime.records import TokenAxis

Rule = Callable[["Operator"], AxisTree]


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator call with its arguments by name."""

    node: fx.Node
    axes: Mapping[fx.Node, AxisTree]
    token: TokenSymbol
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, node: fx.Node, axes: Mapping[fx.Node, AxisTree], token: TokenSymbol) -> Operator:
        """``node``, a call of an ATen operator."""
        return cls(node, axes, token, arguments_of(node))

    def axis(self, name: str) -> Axis:
        """Axis of argument ``name``; None where it is no tensor."""
        return self._axis_of(self.arguments.get(name))

    def _axis_of(self, value: Any) -> Axis:
        found = self.axes.get(value) if isinstance(value, fx.Node) else None
        if isinstance(found, tuple):
            raise NotTokenWiseError("a tuple is used as one value")
        if found is SQUARE:
            raise NotTokenWiseError("one of its arguments has two token dimensions")
        return found

    def moving(self, name: str = "self") -> TokenAxis:
        """Axis of argument ``name``, which must be the only one with tokens."""
        axis = self.axis(name)
        others = [key for key in self.arguments if key != name and self._members(key)]
        if not isinstance(axis, TokenAxis) or others:
            raise NotTokenWiseError(f"tokens are in its argument {others[0] if others else name!r}")
        return axis

    def _members(self, name: str) -> list[Axis]:
        value = self.arguments[name]
        items = value if isinstance(value, (list, tuple)) else [value]
        return [axis for axis in (self._axis_of(item) for item in items) if axis is not None]

    def tensors(self, names: Sequence[str] | None = None) -> list[tuple[torch.Tensor, Axis]]:
        """(traced value, axis) of every tensor among arguments ``names`` (None: all)."""
        found = []
        for name in self.arguments if names is None else names:
            value = self.arguments.get(name)
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, fx.Node) and isinstance(item.meta["val"], torch.Tensor):
                    found.append((item.meta["val"], self._axis_of(item)))
        return found

    def shape(self, name: str = "self") -> torch.Size:
        """Sizes of argument ``name``."""
        shape: torch.Size = self.arguments[name].meta["val"].shape
        return shape

    @property
    def result(self) -> Any:
        """The traced result."""
        return self.node.meta["val"]

    def dim(self, name: str = "dim", of: str = "self") -> int:
        """Argument ``name``, a dimension of ``of``, counted from the front."""
        return int(self.arguments[name]) % max(len(self.shape(of)), 1)

    def everywhere(self, axis: Axis) -> AxisTree:
        """``axis`` for each result."""
        return tuple(axis for _ in self.result) if isinstance(self.result, (list, tuple)) else axis


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Arguments of an ATen call by name, defaults included."""
    named = {}
    for index, (name, default) in enumerate(_parameters_of(node.target)):
        named[name] = node.args[index] if index < len(node.args) else node.kwargs.get(name, default)
    return named


@lru_cache(maxsize=1 << 12)
def _parameters_of(operator: Any) -> tuple[tuple[str, Any], ...]:
    """(name, default) of each argument; PyTorch makes its list anew whenever it is asked."""
    return tuple((one.name, one.default_value) for one in operator._schema.arguments)


def operator_name(node: fx.Node) -> str:
    """``aten.linear`` for ``aten.linear.default``."""
    packet = getattr(node.target, "_overloadpacket", None)
    return str(packet) if packet is not None else str(getattr(node.target, "__name__", node.target))


def follow(node: fx.Node, axes: Mapping[fx.Node, AxisTree], token: TokenSymbol) -> AxisTree:
    """Axes of the results of ``node``.

    Raises:
        NotTokenWiseError: it mixes tokens, or is not known.
    """
    if operator_name(node) == "getitem":
        members = axes[node.args[0]]  # type: ignore[index]
        assert isinstance(members, tuple), "getitem takes a member of a tuple"
        return members[node.args[1]]  # type: ignore[index]
    if not hasattr(node.target, "_schema"):
        raise NotTokenWiseError("it is no operator of PyTorch")
    operator = Operator.of(node, axes, token)
    name = operator_name(node).removeprefix("aten.")
    rule = _RULES.get(name)
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _pointwise
    if rule is None:
        raise NotTokenWiseError("it is not known to treat tokens one by one")
    try:
        return rule(operator)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise NotTokenWiseError(f"its arguments are not understood: {type(error).__name__}: {error}") from error


# ---- rules


def _aligned(tensors: Sequence[tuple[torch.Tensor, Axis]], dims: int) -> Axis:
    """Axis of the broadcast of ``tensors`` to ``dims`` dimensions: all have tokens at the same place from the end."""
    places = {(a.dim - value.dim(), a.outer, a.inner) for value, a in tensors if isinstance(a, TokenAxis)}
    if not places:
        return None
    if len(places) > 1:
        raise NotTokenWiseError("the token dimensions of its arguments are not the same one")
    ((place, outer, inner),) = places
    for value, axis in tensors:
        if axis is None and value.dim() >= -place and value.shape[place] != 1:
            raise NotTokenWiseError("an argument without tokens has values along the token dimension")
    return at(place + dims, outer, inner)


def _pointwise(op: Operator) -> AxisTree:
    return _aligned(op.tensors(), op.result.dim())


def _same(op: Operator) -> AxisTree:
    return op.everywhere(op.moving("self" if "self" in op.arguments else "input"))


def _reshape(op: Operator) -> AxisTree:
    return reshaped(op.shape(), op.moving(), op.result.shape, op.token)


def _transpose(op: Operator) -> AxisTree:
    axis, count = op.moving(), len(op.shape())
    first, second = (0, 1) if "dim0" not in op.arguments else (op.dim("dim0"), op.dim("dim1"))
    order = list(range(count))
    if count >= 2:
        order[first], order[second] = order[second], order[first]
    return at(order.index(axis.dim), axis.outer, axis.inner)


def _permute(op: Operator) -> AxisTree:
    axis = op.moving()
    order = [int(dim) % len(op.shape()) for dim in op.arguments["dims"]]
    return at(order.index(axis.dim), axis.outer, axis.inner)


def _unsqueeze(op: Operator) -> AxisTree:
    axis = op.moving()
    place = int(op.arguments["dim"]) % (len(op.shape()) + 1)
    return at(axis.dim + (place <= axis.dim), axis.outer, axis.inner)


def _squeeze(op: Operator) -> AxisTree:
    axis, shape = op.moving(), op.shape()
    dims = op.arguments.get("dim", range(len(shape)))
    chosen = {int(dim) % len(shape) for dim in ([dims] if isinstance(dims, int) else dims)}
    gone = [dim for dim in chosen if dim != axis.dim and not op.token.grows(shape[dim]) and shape[dim] == 1]
    return at(axis.dim - sum(dim < axis.dim for dim in gone), axis.outer, axis.inner)


def _expand(op: Operator) -> AxisTree:
    return _aligned([(op.arguments["self"].meta["val"], op.moving())], op.result.dim())


def _off_axis(op: Operator) -> AxisTree:
    """Works along ``dim``, which must not be the token dimension, and keeps all dimensions."""
    axis = op.moving()
    if op.dim() == axis.dim:
        raise NotTokenWiseError("it works along the token dimension")
    return op.everywhere(axis)


def _slice(op: Operator) -> AxisTree:
    axis = op.moving()
    if op.dim() != axis.dim:
        return axis
    whole = op.token.expression(op.result.shape[axis.dim]) == op.token.expression(op.shape()[axis.dim])
    if not whole or op.arguments["step"] != 1:
        raise NotTokenWiseError("it takes a part of the tokens")
    return axis


def _lost(op: Operator) -> AxisTree:
    """Takes one element of ``dim``, or splits it up, so that the dimension is gone from the result."""
    axis, dim = op.moving(), op.dim()
    if dim == axis.dim:
        raise NotTokenWiseError("it takes single tokens")
    return op.everywhere(at(axis.dim - (dim < axis.dim), axis.outer, axis.inner))


def _reduce(op: Operator) -> AxisTree:
    if "other" in op.arguments:
        return _pointwise(op)  # max and min of two tensors
    axis, count = op.moving(), len(op.shape())
    dims = op.arguments.get("dim")
    if dims is None or dims == []:
        raise NotTokenWiseError("it reduces over all elements")
    chosen = {int(dim) % count for dim in ([dims] if isinstance(dims, int) else dims)}
    if axis.dim in chosen:
        raise NotTokenWiseError("it reduces over the token dimension")
    shift = 0 if op.arguments.get("keepdim") else sum(dim < axis.dim for dim in chosen)
    return op.everywhere(at(axis.dim - shift, axis.outer, axis.inner))


def _joined(op: Operator) -> AxisTree:
    """``cat`` and ``stack`` of tensors that all have their tokens at the same place."""
    parts = op.tensors(["tensors"])
    axes = {axis for _, axis in parts}
    (axis,) = axes if len(axes) == 1 else (None,)
    if not isinstance(axis, TokenAxis):
        raise NotTokenWiseError("it joins values with tokens and values without")
    count = parts[0][0].dim()
    if operator_name(op.node) == "aten.stack":
        place = int(op.arguments["dim"]) % (count + 1)
        return at(axis.dim + (place <= axis.dim), axis.outer, axis.inner)
    if int(op.arguments["dim"]) % count == axis.dim:
        raise NotTokenWiseError("it joins values along the token dimension")
    return axis


def _linear(op: Operator) -> AxisTree:
    axis = op.moving("input")
    if axis.dim == len(op.shape("input")) - 1:
        raise NotTokenWiseError("it sums over the token dimension")
    return axis


def _product(op: Operator, left: str, right: str) -> AxisTree:
    """Batched matrix product: tokens may be rows of the left, columns of the right, or a batch dimension of both."""
    first, second = op.axis(left), op.axis(right)
    a, b = op.shape(left), op.shape(right)
    dims = op.result.dim()
    places = set()
    for axis, shape, contracted, free in ((first, a, -1, -2), (second, b, -2, -1)):
        if not isinstance(axis, TokenAxis):
            continue
        place = axis.dim - len(shape)
        if len(shape) == 1 or place == contracted:
            raise NotTokenWiseError("it sums over the token dimension")
        # With a vector on the other side its dimension is missing from the result.
        lost = int(len(b if free == -2 else a) == 1)
        places.add((place == free, place + (lost if place < contracted or place == -2 else 0), axis.outer, axis.inner))
        other = b if free == -2 else a
        batched = place < -2
        other_axis = second if free == -2 else first
        if batched and other_axis is None and len(other) >= -place and other[place] != 1:
            raise NotTokenWiseError("an argument without tokens has values along the token dimension")
    if len(places) != 1:
        raise NotTokenWiseError("every token meets every other")
    ((is_free, place, outer, inner),) = places
    if is_free and isinstance(first, TokenAxis) and isinstance(second, TokenAxis):
        raise NotTokenWiseError("every token meets every other")
    return at(place + dims, outer, inner)


def _matmul(op: Operator) -> AxisTree:
    right = "other" if "other" in op.arguments else "mat2"
    return _product(op, "self", right)


def _addmm(op: Operator) -> AxisTree:
    left, right = ("batch1", "batch2") if "batch1" in op.arguments else ("mat1", "mat2")
    product = _product(op, left, right)
    added = op.arguments["self"].meta["val"]
    return _aligned([(op.result, product if isinstance(product, TokenAxis) else None), (added, op.axis("self"))],
                    op.result.dim())  # fmt: skip


def _norm(op: Operator) -> AxisTree:
    """Layer and RMS norms over the last dimensions."""
    axis = op.moving("input")
    shape = op.shape("input")
    if axis.dim >= len(shape) - len(op.arguments["normalized_shape"]):
        raise NotTokenWiseError("it normalises over the token dimension")
    return op.everywhere(axis)


def _embedding(op: Operator) -> AxisTree:
    if op.arguments.get("scale_grad_by_freq"):
        raise NotTokenWiseError("its gradient counts tokens in the whole batch")
    if op.arguments.get("sparse"):
        raise NotTokenWiseError("its gradient is sparse")
    return op.moving("indices")


def _gather(op: Operator) -> AxisTree:
    """``gather`` and ``scatter``: each token's own values, by numbers of its own."""
    parts = op.tensors(["self", "index", "src"])
    axis = _aligned(parts, op.result.dim())
    if not isinstance(axis, TokenAxis) or op.dim() == axis.dim or len({one for _, one in parts}) > 1:
        raise NotTokenWiseError("it gathers along the token dimension")
    return axis


def _index(op: Operator) -> AxisTree:
    """Values picked by tensors of numbers: of every token the same ones, or for every token some of what has none."""
    used = [dim for dim, one in enumerate(op.arguments["indices"]) if one is not None]
    picked = op.tensors(["indices"])
    if any(value.dtype in (torch.bool, torch.uint8) for value, _ in picked):
        raise NotTokenWiseError("how many values it picks depends on data")
    count = max(value.dim() for value, _ in picked)
    together = used == list(range(used[0], used[-1] + 1))
    first = used[0] if together else 0
    axis, found = op.axis("self"), _aligned(picked, count)
    if axis is None and isinstance(found, TokenAxis):
        return at(first + found.dim, found.outer, found.inner)
    if not isinstance(axis, TokenAxis) or isinstance(found, TokenAxis) or axis.dim in used:
        raise NotTokenWiseError("it picks tokens")
    before = axis.dim - sum(dim < axis.dim for dim in used)
    return at(before + (count if first <= before else 0), axis.outer, axis.inner)


def _slice_scatter(op: Operator) -> AxisTree:
    axis = _aligned(op.tensors(["self", "src"]), op.result.dim())
    if not isinstance(axis, TokenAxis) or op.dim() == axis.dim:
        raise NotTokenWiseError("it writes to a part of the tokens")
    return axis


def _select_scatter(op: Operator) -> AxisTree:
    ((whole, axis), (part, written)), dim = op.tensors(["self", "src"]), op.dim()
    if isinstance(written, TokenAxis):
        written = at(written.dim + (dim <= written.dim), written.outer, written.inner)
    axis = _aligned([(whole, axis), (part.unsqueeze(dim), written)], op.result.dim())
    if not isinstance(axis, TokenAxis) or dim == axis.dim:
        raise NotTokenWiseError("it writes to single tokens")
    return axis


def _complex(op: Operator) -> AxisTree:
    """Pairs of numbers in the last dimension become one number."""
    axis = op.moving()
    if axis.dim == len(op.shape()) - 1:
        raise NotTokenWiseError("it takes tokens for parts of numbers")
    return axis


def _created(op: Operator) -> AxisTree:
    """The same constant everywhere."""
    return op.token.plain_axis(op.result)


def _attention(op: Operator) -> AxisTree:
    """Attention whose tokens are a batch dimension, or queries to keys that have none of these tokens."""
    query, keys, values = (op.axis(name) for name in ("query", "key", "value"))
    if not isinstance(query, TokenAxis) or op.arguments.get("dropout_p"):
        raise NotTokenWiseError("every query meets every token")
    count = len(op.shape("query"))
    if query.dim < count - 2:
        return _aligned(op.tensors(), op.result.dim())
    if query.dim == count - 1 or keys or values or op.arguments.get("is_causal"):
        raise NotTokenWiseError("every token meets every other")
    if op.arguments.get("attn_mask") is not None:
        mask = op.arguments["attn_mask"].meta["val"]
        _aligned([(op.arguments["query"].meta["val"], query), (mask, op.axis("attn_mask"))], op.result.dim())
    return query


def _mirror(op: Operator) -> AxisTree:
    """``flip`` and ``roll``: along other dimensions than tokens."""
    axis, count = op.moving(), len(op.shape())
    if not op.arguments["dims"] or axis.dim in {int(dim) % count for dim in op.arguments["dims"]}:
        raise NotTokenWiseError("it moves tokens")
    return axis


def _pad(op: Operator) -> AxisTree:
    axis, pad = op.moving(), op.arguments["pad"]
    if axis.dim >= len(op.shape()) - len(pad) // 2:
        from_the_end = len(op.shape()) - 1 - axis.dim
        if any(pad[2 * from_the_end : 2 * from_the_end + 2]):
            raise NotTokenWiseError("it adds tokens")
    return axis


def _repeat(op: Operator) -> AxisTree:
    axis, count = op.moving(), len(op.shape())
    repeats = [int(n) for n in op.arguments["repeats"]]
    place = axis.dim + len(repeats) - count
    if repeats[place] != 1:
        raise NotTokenWiseError("it repeats tokens")
    return at(place, axis.outer, axis.inner)


def _last_two(op: Operator) -> AxisTree:
    axis, count = op.moving(), len(op.shape())
    return at(2 * count - 3 - axis.dim, axis.outer, axis.inner) if axis.dim >= count - 2 else axis


def _prelu(op: Operator) -> AxisTree:
    """One slope, or one for each of the dimension behind the first."""
    axis = op.moving()
    if op.arguments["weight"].meta["val"].numel() != 1 and axis.dim == 1:
        raise NotTokenWiseError("it has a slope for each token")
    return axis


def _group_norm(op: Operator) -> AxisTree:
    axis = op.moving("input")
    if axis.dim != 0:
        raise NotTokenWiseError("it normalises over the tokens of a sequence")
    return axis


def _einsum(op: Operator) -> AxisTree:
    operands = [(value.dim(), axis) for value, axis in op.tensors(["tensors"])]
    return einsum_axis(op.arguments["equation"], operands)


def _declared(op: Operator) -> AxisTree:
    """A module that was declared token-wise, and tested."""
    return DECLARED[op.arguments["key"]].axes([axis for _, axis in op.tensors(["tensors"])])


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Rule] = {
    **_named(_pointwise, "where masked_fill type_as clamp expand_as hardswish log_sigmoid polar special_i0"),
    **_named(_same, "contiguous clone detach alias to _to_copy zeros_like ones_like full_like empty_like"
                    " lift_fresh_copy float fill zero dropout native_dropout view_as_real real imag"
                    " conj _conj resolve_conj"),
    **_named(_reshape, "view reshape _unsafe_view flatten unflatten"),
    **_named(_transpose, "transpose t swapaxes"),
    **_named(_permute, "permute"),
    **_named(_unsqueeze, "unsqueeze"),
    **_named(_squeeze, "squeeze"),
    **_named(_expand, "expand broadcast_to"),
    **_named(_slice, "slice"),
    **_named(_lost, "select unbind"),
    **_named(_off_axis, "split split_with_sizes chunk softmax _softmax log_softmax _log_softmax cumsum"
                        " index_select repeat_interleave tensor_split glu topk cumprod logcumsumexp"),
    **_named(_reduce, "mean sum nansum amax amin var std logsumexp norm linalg_vector_norm argmax argmin max min prod"
                      " any all var_mean"),
    **_named(_joined, "cat stack concat"),
    **_named(_linear, "linear"),
    **_named(_matmul, "matmul mm bmm"),
    **_named(_addmm, "addmm baddbmm"),
    **_named(_norm, "layer_norm rms_norm native_layer_norm"),
    **_named(_group_norm, "group_norm"),
    **_named(_embedding, "embedding"),
    **_named(_gather, "gather scatter scatter_add"),
    **_named(_complex, "view_as_complex"),
    **_named(_index, "index"),
    **_named(_slice_scatter, "slice_scatter"),
    **_named(_select_scatter, "select_scatter"),
    **_named(_created, "zeros ones full new_zeros new_ones new_full new_empty scalar_tensor"),
    **_named(_attention, "scaled_dot_product_attention"),
    **_named(_mirror, "flip roll"),
    **_named(_pad, "constant_pad_nd pad"),
    **_named(_repeat, "repeat"),
    **_named(_last_two, "mT mH adjoint"),
    **_named(_prelu, "prelu"),
    **_named(_einsum, "einsum"),
    **_named(_declared, OPERATOR),
}  # fmt: skip
