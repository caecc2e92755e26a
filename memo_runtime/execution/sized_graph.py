"""Graphs whose sizes depend on a number of tokens, found from two graphs that were traced at two numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

#: A graph as nested tuples, which compare; nodes are ``Place``s.
Reading = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """A node, by its place in the graph."""

    index: int


@dataclass(frozen=True, slots=True)
class Line:
    """A size: ``slope * tokens + offset``."""

    slope: int
    offset: int

    def at(self, tokens: int) -> int:
        """For a number of tokens."""
        return self.slope * tokens + self.offset


def read(graph: fx.Graph) -> Reading:
    """``graph`` as nested tuples; of tensors that it is given sizes, strides and dtypes are in it."""
    places = {node: Place(index) for index, node in enumerate(graph.nodes)}

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return places[value]
        if isinstance(value, tuple | list):
            return (type(value).__name__, *map(plain, value))
        if isinstance(value, dict):
            return ("dict", *((name, plain(one)) for name, one in value.items()))
        # True == 1 == 1.0, and an operator may do something else with each.
        return (type(value).__name__, value) if isinstance(value, bool | float) else value

    return tuple(
        (node.op, _given(node.meta["val"]) if node.op == "placeholder" else node.target,
         plain(node.args), plain(node.kwargs))
        for node in graph.nodes
    )  # fmt: skip


def operators_of(graph: fx.Graph) -> Reading:
    """``read`` without what it is given."""
    return tuple(one for one in read(graph) if one[0] != "placeholder")


def _given(value: torch.Tensor) -> tuple[Any, ...]:
    return (tuple(value.shape), tuple(value.stride()), value.dtype)


@dataclass(frozen=True, slots=True)
class Sized:
    """A graph as nested tuples in which ``Line``s stand for sizes."""

    form: Reading

    @classmethod
    def between(cls, first: tuple[int, Reading], second: tuple[int, Reading]) -> Sized | None:
        """What two graphs have in common, each with its number of tokens; None: they are no such graph."""
        form = in_common(first, second)
        return None if form is None else cls(form)

    def at(self, tokens: int) -> Reading:
        """The graph for a number of tokens."""
        found: Reading = put_in(self.form, tokens)
        return found

    def lines(self) -> list[tuple[Any, ...]]:
        """(sizes, strides, dtype) of each tensor that it is given."""
        return [given for op, given, _, _ in self.form if op == "placeholder"]

    def fits(self, tokens: int, tensors: Sequence[torch.Tensor]) -> bool:
        """``tensors`` lie in memory as what it is given at ``tokens``; a stride of one element may be any."""
        for one, form in zip(tensors, self.lines(), strict=True):
            shape, strides, dtype = put_in(form, tokens)
            pairs = zip(shape, one.stride(), strides, strict=False)
            if (tuple(one.shape), one.dtype) != (shape, dtype) or any(size > 1 and a != b for size, a, b in pairs):
                return False
        return True

    def graph(self, alone: int | None = None) -> fx.Graph:
        """As a graph, whose first input is the number of tokens; or for the number ``alone``."""
        made = fx.Graph()
        form = self.form if alone is None else self.at(alone)
        tokens = made.placeholder("tokens") if alone is None else None
        nodes: list[Any] = []
        sizes: dict[Line, fx.Node] = {}

        def size(line: Line) -> fx.Node:
            assert tokens is not None, "sizes of one number are numbers"
            if line not in sizes:
                node = tokens
                if line.slope != 1:
                    node = made.call_function(operator.mul, (node, line.slope))
                if line.offset:
                    node = made.call_function(operator.add, (node, line.offset))
                sizes[line] = node
            return sizes[line]

        for index, (op, target, args, kwargs) in enumerate(form):
            if op == "placeholder":
                nodes.append(made.placeholder(f"given_{index}"))
            elif op == "output":
                made.output(_back(args, nodes, size)[0])
            else:
                nodes.append(made.call_function(target, _back(args, nodes, size), _back(kwargs, nodes, size)))
        return made


class _DifferError(Exception):
    """Two graphs differ in more than sizes."""


def in_common(first: tuple[int, Any], second: tuple[int, Any]) -> Any:
    """Two nested tuples, each with its tokens, as one with a ``Line`` for each number in which they differ.

    None: they differ in more.
    """
    if first[0] == second[0]:
        return None
    try:
        return _common(first[1], second[1], first[0], second[0])
    except _DifferError:
        return None


def put_in(form: Any, tokens: int) -> Any:
    """``form`` for a number of tokens."""
    if isinstance(form, Line):
        return form.at(tokens)
    return tuple(put_in(one, tokens) for one in form) if isinstance(form, tuple) else form


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _common(one: Any, other: Any, tokens: int, others: int) -> Any:
    if _is_size(one) and _is_size(other):
        return _line(one, other, tokens, others)
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return tuple(_common(mine, theirs, tokens, others) for mine, theirs in zip(one, other, strict=True))
    if type(one) is not type(other) or one != other:
        raise _DifferError
    return one


def _line(one: int, other: int, tokens: int, others: int) -> int | Line:
    if one == other:
        return one
    slope, rest = divmod(one - other, tokens - others)
    if rest or slope <= 0:
        raise _DifferError
    return Line(slope, one - slope * tokens)


def _back(value: Any, nodes: list[Any], size: Callable[[Line], fx.Node]) -> Any:
    """What ``read`` made a tuple of, with nodes of another graph."""
    if isinstance(value, Place):
        return nodes[value.index]
    if isinstance(value, Line):
        return size(value)
    if not isinstance(value, tuple):
        return value
    kind, *rest = value
    if kind in ("bool", "float"):
        return rest[0]
    if kind == "dict":
        return {name: _back(one, nodes, size) for name, one in rest}
    made = [_back(one, nodes, size) for one in rest]
    return tuple(made) if kind == "tuple" else made
