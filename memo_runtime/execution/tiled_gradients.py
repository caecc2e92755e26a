"""Gradients of one block while its backward runs.

Values with tokens have a gradient of their own length and dtype, filled tile by tile. Values without (parameters, and
what is made from them) are summed over tiles, in fp32 where they are of lower precision. Of one that is met once, by a
tile that holds all tokens, there is nothing to sum: its gradient is made in its own precision, as autograd makes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from memo_runtime.capture.axes import rows
from memo_runtime.capture.captured import Captured
from memo_runtime.capture.split import Segment
from memo_runtime.execution.tiled_programs import Factors, RowFactors, accumulate
from memo_runtime.execution.tiled_rows import gapless_like, gapless_place, gapless_rows, same_memory
from memo_runtime.records import TokenAxis


@dataclass(frozen=True, slots=True)
class Part:
    """The gradient of one value from one tile of tokens [start, stop): where it is among a program's results."""

    place: int | Factors | RowFactors
    results: Sequence[torch.Tensor]
    start: int
    stop: int

    def add_to(self, total: torch.Tensor, *, first: bool) -> None:
        """Add the gradient of a value without tokens to ``total``; ``first``: nothing is there yet."""
        place = self.place
        if isinstance(place, Factors):
            left, right = self.results[place.left], self.results[place.right]
            accumulate(total, left, right, transposed=place.transposed, first=first)
            return
        assert isinstance(place, int), "a weight has no rows"
        if first:
            total.copy_(self.results[place])
        else:
            total.add_(self.results[place])

    def of_rows(self) -> torch.Tensor:
        """The gradient itself of a value with tokens."""
        place = self.place
        if isinstance(place, RowFactors):
            product = torch.mm(self.results[place.left], self.results[place.right])
            return product.as_strided(place.layout.shape, place.layout.stride())
        assert isinstance(place, int), "factors without a layout are a weight's"
        return self.results[place]

    def multiply_into(self, target: torch.Tensor | None, *, add: bool) -> bool:
        """Have the GEMM write to ``target``, or add to it; False: the gradient is no product, or lies otherwise."""
        place = self.place
        if target is None or not isinstance(place, RowFactors) or not same_memory(target, place.layout):
            return False
        if target.dtype != place.layout.dtype:
            return False
        left, right = self.results[place.left], self.results[place.right]
        matrix = target.as_strided((left.shape[0], right.shape[1]), (right.shape[1], 1))
        if add:
            matrix.addmm_(left, right)
        else:
            torch.mm(left, right, out=matrix)
        return True


class Gradients:
    """Sums of gradients by value; ``once``: values that are ``met_once``."""

    def __init__(self, differentiable: set[fx.Node], tokens: int, once: Collection[fx.Node] = ()) -> None:
        self._wanted = differentiable
        self._tokens = tokens
        self._once = once
        self._sums: dict[fx.Node, torch.Tensor] = {}
        self._owned: set[fx.Node] = set()
        #: Memory that the gradients of some values may be written to.
        self._places: dict[fx.Node, torch.Tensor] = {}
        self._over: set[fx.Node] = set()
        #: Values whose first full-length gradient is being filled, and up to where.
        self._filled: dict[fx.Node, int] = {}

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._sums

    def add(self, node: fx.Node, grad: torch.Tensor) -> None:
        """Add a whole gradient."""
        if node not in self._wanted:
            return
        if node not in self._sums:
            self._sums[node] = grad  # somebody else's memory: copied before anything is added to it
        else:
            self._own(node).add_(grad)

    def place(self, node: fx.Node, over: torch.Tensor) -> None:
        """Write the gradient of ``node`` over ``over``, which is laid out like it; each of its tiles is read before."""
        self._places[node] = over
        self._over.add(node)

    def in_order(self, nodes: Sequence[fx.Node]) -> list[int]:
        """In which order the gradients of one tile are added: those that are written over another come last.

        What a program yields for other values may be views of that one (of a residual, as factors of a weight's).
        """
        return sorted(range(len(nodes)), key=lambda index: nodes[index] in self._over)

    def take_owned(self, node: fx.Node) -> tuple[torch.Tensor | None, bool]:
        """The sum so far, which is not kept, and whether its memory is nobody else's."""
        owned = node in self._owned
        return self.take(node), owned

    def take(self, node: fx.Node) -> torch.Tensor | None:
        """The sum so far, which is not kept."""
        self._owned.discard(node)
        self._filled.pop(node, None)
        return self._sums.pop(node, None)

    def add_tile(self, node: fx.Node, axis: TokenAxis | None, part: Part, value: torch.Tensor) -> None:
        """Add what the backward program of one tile yielded for ``node``, whose value is ``value``."""
        if axis is not None:
            self._add_rows(node, axis, part, value)
            return
        first = node not in self._sums
        if first:
            alone = node in self._once and (part.start, part.stop) == (0, self._tokens)
            self._sums[node] = torch.empty_like(value, dtype=value.dtype if alone else sum_dtype(value.dtype))
            self._owned.add(node)
        part.add_to(self._own(node), first=first)

    def _add_rows(self, node: fx.Node, axis: TokenAxis, part: Part, value: torch.Tensor) -> None:
        start, stop = part.start, part.stop
        if start == 0 and node not in self._sums:
            place = self._places.pop(node, None)
            self._sums[node] = place if place is not None else torch.empty_like(value)
            self._owned.add(node)
            self._filled[node] = 0
        total, fresh = self._own(node), self._filled.get(node) == start
        if fresh:
            self._filled[node] = stop
        # What is written over another gradient may be a factor of it.
        if node not in self._over and part.multiply_into(gapless_rows(total, axis, start, stop), add=not fresh):
            return
        target = rows(total, axis, self._tokens, start, stop)
        grad = part.of_rows().reshape(target.shape)
        if not fresh:
            target.add_(grad)
        elif not same_elements(target, grad):
            # The gradient of a residual is that of the result, and may be in its place already.
            target.copy_(grad)

    def _own(self, node: fx.Node) -> torch.Tensor:
        """The sum, in memory that may be written to."""
        if node not in self._owned:
            wide = self._sums[node]
            self._sums[node] = wide.clone(memory_format=torch.contiguous_format)
            self._owned.add(node)
        return self._sums[node]


def tangent(
    layout: torch.Tensor, axis: TokenAxis | None, grad: torch.Tensor | None, *,
    tokens: int, tile: tuple[int, int], device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """Rows of the gradient of an output, without gaps as when traced; zeros where nothing depends on it."""
    assert axis is not None, "a segment yields values with tokens"
    if grad is None:
        return gapless_like(layout, device).zero_()
    part = rows(grad, axis, tokens, *tile)
    if axis.outer != 1 or axis.inner != 1:
        part = part.flatten(axis.dim, axis.dim + 2)
    if part.dtype == layout.dtype and (strides := gapless_place(part, layout)) is not None:
        return part.as_strided(layout.shape, strides)
    return gapless_like(layout, grad.device).copy_(part)


def met_once(captured: Captured) -> frozenset[fx.Node]:
    """Values without tokens, and of no size that depends on them, whose gradient comes from one segment alone.

    A segment whose tiles are shorter than the others' (``by_rows``) has several where these have one.
    """
    stages, token = captured.stages, captured.traced.token
    met: Counter[fx.Node] = Counter()
    alone: set[fx.Node] = set()
    for stage in stages.stages:
        if isinstance(stage, Segment):
            met.update(stage.sources)
            alone.update(node for node in stage.sources
                         if stage.axes[node] is None and not token.dims(node.meta["val"]) and not stage.by_rows)
        else:
            met.update(stage.inputs)
    met.update(one for node in stages.weights for one in node.all_input_nodes)
    met.update(node for node in captured.outputs if isinstance(node, fx.Node))
    return frozenset(node for node in alone if met[node] == 1)


def same_elements(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Two tensors of one shape and dtype are the same memory, whatever the strides of their dimensions of size one."""
    if one.dtype != other.dtype or one.data_ptr() != other.data_ptr():
        return False
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or first == second for size, first, second in strides)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients of values without tokens are summed in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
