"""Whether a trace holds for a length that its conditions exclude.

PyTorch sets conditions that have no meaning for what a block computes: of ``mask[:, :tokens, :tokens]`` it asks whether
it lies without gaps in memory, which it does where the table has as many rows as the sequence has tokens and nowhere
else. So the block is traced once more at that length, without symbols: where the operators are the same, with the same
numbers and sizes in them, the trace holds for it. A slice of all there is is nothing but its source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

#: A size of a trace as a number.
Number = Callable[[Any], Any]

aten = torch.ops.aten


def same_operators(symbolic: fx.Graph, number: Number, plain: fx.Graph) -> bool:
    """The two do the same, where sizes of ``symbolic`` are what ``number`` says."""
    found = _written_down(symbolic, number)
    return found is not None and found == _written_down(plain, lambda size: size)


def _written_down(graph: fx.Graph, number: Number) -> list[Any] | None:
    """Operators in order, their arguments by the order of those that make them; None: there are constants in it.

    Constants of a graph are tensors, whose values are not compared.
    """
    lines: list[Any] = []
    names: dict[fx.Node, str] = {}

    def plain(one: Any) -> Any:
        if isinstance(one, fx.Node):
            return names[one] if one in names else number(one.meta["val"])
        return number(one) if isinstance(one, torch.SymInt) else one

    for node in graph.nodes:
        if node.op == "get_attr":
            return None
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)):
            continue
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and _is_its_source(node, number):
            names[node] = names[source]
            continue
        names[node] = f"%{len(lines)}"
        made = [(list(map(number, one.shape)), one.dtype) for one in _tensors(value)]
        arguments = fx.node.map_aggregate((node.args, node.kwargs), plain)
        lines.append((node.op, node.op == "call_function" and node.target, arguments, made))
    return lines


def _is_its_source(node: fx.Node, number: Number) -> bool:
    """``node`` yields the tensor that it is given: another name for it, or a slice of everything."""
    if node.target is aten.alias.default:
        return True
    if node.target is not aten.slice.Tensor:
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return list(map(number, before.shape)) == list(map(number, after.shape))


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [one for one in values if isinstance(one, torch.Tensor)]
