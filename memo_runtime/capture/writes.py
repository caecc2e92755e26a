"""Operators that write to a value, in a traced graph, made into ones that yield a new value.

What is written to may be a view, and other views of the same memory may be read later. So of the value that owns the
memory there is a new one after each write, and views that are read afterwards are taken of that:

    y = new_empty(...)                       y = new_empty(...)
    y[..., :n].copy_(a)            ->        y1 = slice_scatter(y, a, -1, 0, n)
    y[..., n:].copy_(b)                      y2 = slice_scatter(y1, b, -1, n, 2 * n)
    use(y)                                   use(y2)

and where the slices that are written are all of it, ``y2 = cat([a, b], -1)``, which reads nothing of ``y``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from memo_runtime.capture.axes import TokenSymbol
from memo_runtime.capture.rules import arguments_of, operator_name
from memo_runtime.errors import CaptureRefusedError

aten = torch.ops.aten
#: Pure forms of these yield booleans, and in place the number that stands for one.
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "logical_not")


def without_writes(graph: fx.Graph, token: TokenSymbol) -> None:
    """Rewrite ``graph`` in place.

    Raises:
        CaptureRefusedError: it writes to an argument, a parameter or a buffer, or in a way that has no pure form.
    """
    writes = [node for node in graph.nodes if getattr(getattr(node.target, "_schema", None), "is_mutable", False)]
    if not writes:
        return
    rewriter = _Writes(graph, token)
    for node in writes:
        rewriter.replace(node)
    for node in list(graph.nodes):
        if node.target is aten.slice_scatter.default:
            _join(node)


def _storages(value: Any) -> set[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return {one.untyped_storage()._cdata for one in values if isinstance(one, torch.Tensor)}


class _Writes:
    def __init__(self, graph: fx.Graph, token: TokenSymbol) -> None:
        self.graph = graph
        self.token = token
        #: Values after a write. What is traced says that their memory is that of the values before.
        self.made: set[fx.Node] = set()

    def replace(self, node: fx.Node) -> None:
        """Replace ``node``, which writes to its first argument."""
        name, target = operator_name(node), node.args[0]
        if not isinstance(target, fx.Node):
            raise CaptureRefusedError(name, "it writes to several values")
        order = {one: index for index, one in enumerate(self.graph.nodes)}
        memory = _storages(target.meta["val"])
        aliases = [one for one in order if order[one] < order[node] and memory & _storages(one.meta.get("val"))]
        if any(one.op == "placeholder" for one in aliases):
            raise CaptureRefusedError(name, "it writes to an argument, a parameter or a buffer of the block")
        later = {one: [user for user in one.users if order[user] > order[node]] for one in aliases}
        others = [one for one in aliases if one is not target and later[one]]
        with self.graph.inserting_before(node):
            value = self._value(node, target)
            new = self._renewed(name, target, value, others) if others else {target: value}
        self.made.add(value)
        for one in (target, *others):
            for user in later[one]:
                user.replace_input_with(one, new[one])
        node.replace_all_uses_with(new[target])
        self.graph.erase_node(node)

    def _call(self, operator: Any, args: tuple[Any, ...], value: Any, kwargs: dict[str, Any] | None = None) -> fx.Node:
        made = self.graph.call_function(operator, args, kwargs or {})
        made.meta["val"] = value
        return made

    def _value(self, node: fx.Node, target: fx.Node) -> fx.Node:
        """What ``node`` writes, with the shape and dtype of ``target``."""
        name, value = operator_name(node), target.meta["val"]
        if node.target is aten.copy_.default:
            source: Any = node.args[1]
            if source.meta["val"].device != value.device:
                raise CaptureRefusedError(name, "it copies between devices")
            # Also where nothing is cast: what is written to later must not be taken for the source.
            copied = self._call(aten.to.dtype, (source, value.dtype), value)
            return self._broadcast(copied, source.meta["val"], target)
        pure = _pure_overload(node)
        if pure is None:
            raise CaptureRefusedError(name, "it writes to its argument and has no form that does not")
        found = self._call(pure, node.args, value, dict(node.kwargs))
        given = {one.meta["val"].dtype for one in node.all_input_nodes if isinstance(one.meta["val"], torch.Tensor)}
        if len(given) > 1 or name.removeprefix("aten.")[:-1] in _COMPARISONS:
            found = self._call(aten.to.dtype, (found, value.dtype), value)
        return found

    def _broadcast(self, node: fx.Node, given: torch.Tensor, target: fx.Node) -> fx.Node:
        value = target.meta["val"]
        missing, sizes = value.dim() - given.dim(), []
        for dim, size in enumerate(value.shape):
            own = given.shape[dim - missing] if dim >= missing else None
            same = own is not None and self.token.text(own) == self.token.text(size)
            if self.token.grows(size) and not same:
                return self._call(aten.expand_as.default, (node, target), value)
            sizes.append(-1 if same else int(size))
        return node if set(sizes) <= {-1} else self._call(aten.expand.default, (node, sizes), value)

    # ---- other values in the same memory

    def _source(self, node: fx.Node) -> fx.Node | None:
        """What ``node`` is a view of; None: it has memory of its own, or is what was made of a write."""
        memory = _storages(node.meta["val"])
        found = [one for one in node.all_input_nodes if memory & _storages(one.meta["val"])]
        return found[0] if found and node not in self.made else None

    def _renewed(
        self, name: str, target: fx.Node, value: fx.Node, others: list[fx.Node]
    ) -> dict[fx.Node, fx.Node]:
        """By value in the same memory that is used later: what to use, when ``value`` was written to ``target``."""
        views, base = [], target
        while (source := self._source(base)) is not None:
            views.append(base)
            base = source
        for view in views:
            value = self._scattered(name, view, value)
        self.made.add(value)
        new = {base: value}
        for one in (target, *others):
            self._renew(one, new, name)
        return new

    def _renew(self, node: fx.Node, new: dict[fx.Node, fx.Node], name: str) -> None:
        if node in new:
            return
        source = self._source(node)
        if source is None:
            raise CaptureRefusedError(name, "it writes to a value of which a view is used afterwards")
        self._renew(source, new, name)

        def renewed(one: fx.Node) -> fx.Node:
            return new.get(one, one) if one is source else one

        args, kwargs = fx.node.map_arg(node.args, renewed), fx.node.map_arg(node.kwargs, renewed)
        new[node] = self._call(node.target, args, node.meta["val"], kwargs)

    def _scattered(self, name: str, view: fx.Node, value: fx.Node) -> fx.Node:
        """What ``view`` was taken of, with ``value`` in the place of it."""
        whole: Any = self._source(view)
        shape = whole.meta["val"].shape
        kind = operator_name(view).removeprefix("aten.")
        if kind == "alias":
            return value
        named = arguments_of(view) if hasattr(view.target, "_schema") else {}
        if kind == "slice":
            return self._sliced(whole, view, value)
        count = max(1, len(shape))
        if kind == "select":
            args = (whole, value, int(named["dim"]) % count, named["index"])
            return self._call(aten.select_scatter.default, args, whole.meta["val"])
        if kind == "transpose":
            return self._call(view.target, (value, *view.args[1:]), whole.meta["val"])
        if kind == "permute":
            order = [int(dim) % count for dim in named["dims"]]
            back = [order.index(dim) for dim in range(count)]
            return self._call(aten.permute.default, (value, back), whole.meta["val"])
        if kind == "unsqueeze":
            dim = int(named["dim"]) % (count + 1)
            return self._call(aten.squeeze.dim, (value, dim), whole.meta["val"])
        if kind in ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze"):
            sizes = [self._size(whole, dim, size) for dim, size in enumerate(shape)]
            return self._call(aten.reshape.default, (value, sizes), whole.meta["val"])
        raise CaptureRefusedError(name, f"it writes to a view that {operator_name(view)} has taken")

    def _size(self, node: fx.Node, dim: int, size: Any) -> Any:
        return self._call(aten.sym_size.int, (node, dim), size) if self.token.grows(size) else int(size)

    def _sliced(self, whole: fx.Node, view: fx.Node, value: fx.Node) -> fx.Node:
        named, before = arguments_of(view), whole.meta["val"]
        dim = int(named["dim"]) % before.dim()
        if self.token.text(before.shape[dim]) == self.token.text(view.meta["val"].shape[dim]):
            return value
        args = (whole, value, dim, named["start"], named["end"], named["step"])
        return self._call(aten.slice_scatter.default, args, before)


def _pure_overload(node: fx.Node) -> Any:
    packet, overload = operator_name(node).removeprefix("aten."), node.target._overloadname  # type: ignore[union-attr]
    if not packet.endswith("_"):
        return None
    found = getattr(getattr(aten, packet[:-1], None), overload, None)
    return None if found is None or found._schema.is_mutable else found


def _join(node: fx.Node) -> None:
    """Make ``cat`` of ``node``, the last of the writes to slices that are the whole of a value."""
    dim, parts, one = node.args[2], [], cast(Any, node)
    size = node.meta["val"].shape[dim]
    if not isinstance(size, int):
        return
    while one.target is aten.slice_scatter.default and one.args[2] == dim and one.args[5] == 1:
        before, part, _, start, end, _ = one.args
        if isinstance(start, fx.Node) or isinstance(end, fx.Node):
            return
        parts.append((*slice(start, end).indices(size)[:2], part))
        one = before
    parts.sort(key=lambda part: part[:2])
    ends = [0, *(stop for _, stop, _ in parts)]
    if len(parts) < 2 or ends[-1] != size or ends[:-1] != [start for start, _, _ in parts]:
        return
    node.target = aten.cat.default
    node.args = ([part for _, _, part in parts], dim)
