"""Results of a forward program, written to where they are kept.

A tile's results are rows of tensors of full length. A program that yields them leaves a copy to be made; one that is
given the rows writes to them: compiled, what is element-wise (a rotary embedding, a norm) is stored there at once. A
result that is a matrix product, or one added to something, the program does not make at all: it yields the factor,
and the GEMM writes to the rows, or adds to what the program has put there.

    y = x + a @ w      program: rows = x, yields a       then: rows += a @ w
    v = a @ w + bias   program: yields a                 then: rows = a @ w + bias
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from memo_runtime.execution.compilers import Compiler, Program
from memo_runtime.execution.tiled_costs import node_flops
from memo_runtime.execution.tiled_rows import gapless_like, is_dense, same_memory

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Factor:
    """Of a product: a place among what the program is given, or among what it yields."""

    place: int
    given: bool
    transposed: bool = False

    def of(self, given: Sequence[torch.Tensor], yielded: Sequence[torch.Tensor]) -> torch.Tensor:
        one = (given if self.given else yielded)[self.place]
        return one.t() if self.transposed else one


@dataclass(frozen=True, slots=True)
class _Product:
    """The product that is written to the rows of one result; ``bias``: of its own; ``added``: to what is there."""

    left: _Factor
    right: _Factor
    bias: _Factor | None
    added: bool
    shape: tuple[int, int]

    def finish(
        self, rows: torch.Tensor, given: Sequence[torch.Tensor], yielded: Sequence[torch.Tensor]
    ) -> None:
        """Write it to ``rows``, whose elements lie in memory as those of the product."""
        matrix = rows.as_strided(self.shape, (self.shape[1], 1))
        left, right = self.left.of(given, yielded), self.right.of(given, yielded)
        if self.added:
            matrix.addmm_(left, right)
        elif self.bias is not None:
            torch.addmm(self.bias.of(given, yielded), left, right, out=matrix)
        else:
            torch.mm(left, right, out=matrix)


@dataclass(frozen=True, slots=True)
class Placed:
    """A forward program that writes its first results to rows that it is given.

    Args:
        program: sources, rows -> factors, other results. products: by result, what is left to be done.
        factors: how many it yields. flops: of the products that are left.
    """

    program: Program
    products: tuple[_Product | None, ...]
    factors: int
    flops: int

    def __call__(self, sources: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Write to ``rows``, laid out as the results are when traced, without gaps; the other results."""
        given = [*sources, *rows]
        yielded = self.program(*given)
        for one, product in zip(rows, self.products, strict=True):
            if product is not None:
                product.finish(one, given, yielded)
        return yielded[self.factors :]


def placed(graph: fx.Graph, count: int, compiler: Compiler) -> Placed:
    """The program whose first ``count`` results are written to as many inputs behind its own, through ``compiler``."""
    (end,) = (node for node in graph.nodes if node.op == "output")
    results = list(end.args[0])
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        places = [graph.placeholder(f"place_{index}") for index in range(count)]
    factors: list[fx.Node] = []
    products: list[_Product | None] = []
    flops = 0
    given = {node: at for at, node in enumerate(graph.nodes) if node.op == "placeholder"}
    for result, place in zip(results, places, strict=False):
        value = result.meta["val"]
        place.meta["val"] = gapless_like(value, torch.device("meta"))
        last = _last_product(result) if results.count(result) == 1 else None
        source: fx.Node | None = result
        if last is not None:
            source, node = last
            flops += node_flops(node)
            products.append(_product(node, given, factors, added=source is not None))
        else:
            products.append(None)
        if source is not None:
            _write(graph, place, source, first)
    end.args = ((*factors, *results[count:]),)
    _erase_unused(graph, results[:count])
    return Placed(compiler(graph), tuple(products), len(factors), flops)


def _write(graph: fx.Graph, place: fx.Node, source: fx.Node, first: fx.Node) -> None:
    """``place = source``, as soon as it is there."""
    with graph.inserting_before(first) if source.op == "placeholder" else graph.inserting_after(source):
        copy = graph.call_function(aten.copy_.default, (place, source))
    copy.meta["val"] = place.meta["val"]


def _last_product(result: fx.Node) -> tuple[fx.Node | None, fx.Node] | None:
    """(what it is added to, the matrix product) of a result that nothing else in the program needs."""
    product = viewed_product(result)
    if product is not None:
        return None, product
    if result.target is not aten.add.Tensor or len(result.args) != 2 or result.kwargs or not _is_last(result):
        return None
    for at, one in enumerate(result.args):
        other = result.args[1 - at]
        if not isinstance(one, fx.Node) or not isinstance(other, fx.Node) or other is one:
            continue
        product = viewed_product(one)
        if product is not None and product.target is aten.mm.default and _alike(one, result) and _alike(other, result):
            return other, product
    return None


def viewed_product(node: fx.Node) -> fx.Node | None:
    """The product of which ``node`` is every element, each once; None: it is none, or something else needs it."""
    value = node.meta["val"]
    if not is_dense(value):
        return None  # an expanded column has as many elements as the product, and is another value
    while node.op == "call_function" and _is_last(node):
        if node.target is aten.mm.default or (node.target is aten.addmm.default and not node.kwargs):
            made = node.meta["val"]
            whole = made.is_contiguous() and made.numel() == value.numel() and value.storage_offset() == 0
            return node if whole and _same_storage(made, value) and made.dtype == value.dtype else None
        sources = node.all_input_nodes
        if len(sources) != 1 or not _same_storage(sources[0].meta["val"], value):
            return None
        node = sources[0]
    return None


def _is_last(node: fx.Node) -> bool:
    return len(node.users) == 1


def _same_storage(one: Any, other: torch.Tensor) -> bool:
    return isinstance(one, torch.Tensor) and one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _alike(one: fx.Node, result: fx.Node) -> bool:
    value, made = one.meta["val"], result.meta["val"]
    return bool(value.shape == made.shape and value.dtype == made.dtype and same_memory(value, made))


def _product(node: fx.Node, given: dict[fx.Node, int], factors: list[fx.Node], *, added: bool) -> _Product:
    """What is left of ``node`` for the caller; what it needs of the program goes to ``factors``."""

    def factor(one: fx.Node) -> _Factor:
        if one in given:
            return _Factor(given[one], given=True)
        if one.target is aten.t.default and one.args[0] in given:
            return _Factor(given[one.args[0]], given=True, transposed=True)  # type: ignore[index]
        if one not in factors:
            factors.append(one)
        return _Factor(factors.index(one), given=False)

    *bias, left, right = (factor(one) for one in node.args)  # type: ignore[arg-type]
    rows, columns = (int(size) for size in node.meta["val"].shape)
    return _Product(left, right, bias[0] if bias else None, added, (rows, columns))


def _erase_unused(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Erase those of ``nodes`` that nothing uses any more, and what was there for them alone."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node.op == "call_function" and not node.users:
            pending = [one for one in (*pending, *node.all_input_nodes) if one is not node]
            graph.erase_node(node)
