"""Compiled programs for tiles of any number of tokens.

The first sizes of a segment's tiles are compiled each for itself. A run whose batches all have other lengths would
go on so at every step, for seconds; so later sizes share programs, which take the number of tokens as an argument.
Every size in their graph is ``slope * tokens + offset``, found from two graphs that were traced (``sized_graph.py``).
A tile is served by one only if the graph that is traced for it is that very graph with its number put in, and if what
TorchInductor took for granted of the number (a range, mostly) holds of it; else it is compiled by itself. Where all
first sizes, three at least, are of one form, later ones are not traced any more: that takes longer than a short step.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any, Protocol

import torch
from torch import fx

from memo_runtime.execution.compilers import Compiler, NotCompiledError, Program, is_switched_off
from memo_runtime.execution.sized_graph import Reading, Sized, in_common, operators_of, put_in, read
from memo_runtime.execution.sized_program import LEAST, SizedProgram
from memo_runtime.execution.sized_records import back, plain

logger = logging.getLogger("memo_runtime")

#: Sizes that are compiled each for itself; those of a step are among them, where all have one length.
_ALONE = 4
#: Programs that serve many sizes, each within what TorchInductor takes for granted.
_MOST_SHARED = 4
#: Different sizes that have to be of one form before others are taken to be.
_PROOF = 3
#: The number of what makes casts of weights, which is no matter of tokens.
_CASTS = -1


class Casts(Protocol):
    """A program that runs as it is."""

    graph: fx.Graph


@dataclass(slots=True, eq=False)
class _Size:
    """One size of a tile, as a compiler of its programs, which come in the same order for every size."""

    lengths: AnyLength
    tokens: int
    shares: bool
    graphs: list[Reading] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)
    #: How many programs were asked for since it was traced.
    asked: int = 0
    #: Layout and record of all its programs, as nested tuples; and that of these which makes casts of weights.
    record: Any = None
    casts: Casts | None = None

    def __call__(self, graph: fx.Graph) -> Program:
        number, reading = self.asked, read(graph)
        self.asked += 1
        if number < len(self.graphs) and self.graphs[number] == reading:
            return self.programs[number]
        program = _Later(self.lengths, number, self.tokens, graph) if self.shares else self.lengths.alone(graph)
        if not self.shares and number == len(self.graphs):
            self.graphs.append(reading)
            self.programs.append(program)
        return program


class _Later:
    """A program of a later size: which one it is is known when it is first called, as many never are."""

    def __init__(self, lengths: AnyLength, number: int, tokens: int, graph: fx.Graph | None) -> None:
        self._asked: tuple[AnyLength, int, int, fx.Graph | None] | None = (lengths, number, tokens, graph)
        self._program: Program | None = None

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self._program is None:
            assert self._asked is not None, "it was asked for"
            lengths, number, tokens, graph = self._asked
            self._program, self._asked = lengths.program(number, tokens, graph, tensors), None
        return self._program(*tensors)


class AnyLength:
    """Programs of one segment at all sizes of its tiles.

    Args:
        alone: compiles what serves one size.
    """

    def __init__(self, alone: Compiler) -> None:
        self.alone = alone
        self._first: dict[Hashable, _Size] = {}
        #: By number of a program among those of a size: what serves many.
        self._shared: dict[int, list[SizedProgram]] = {}
        self._form: _Form | None = None

    def compiler(self, tokens: int, layout: Hashable) -> Compiler:
        """For the programs of tiles of ``tokens`` tokens, laid out in memory like ``layout``."""
        if layout in self._first:
            self._first[layout].asked = 0
        elif len(self._first) < _ALONE or is_switched_off():
            self._first[layout] = _Size(self, tokens, shares=False)
        return self._first.get(layout) or _Size(self, tokens, shares=True)

    def note(self, layout: Hashable, record: Any, casts: Casts) -> None:
        """The programs of a size were made, and are in ``record``, a dataclass, beside ``casts``."""
        one = self._first.get(layout)
        if one is None or one.record is not None:
            return
        numbers = {id(program): number for number, program in enumerate(one.programs)}
        one.record = plain((layout, operators_of(casts.graph), record), {**numbers, id(casts): _CASTS})
        one.casts = casts
        if len(self._first) == _ALONE and all(size.record is not None for size in self._first.values()):
            self._form = _form_of([size for size in self._first.values() if size.tokens >= LEAST])

    def record(self, tokens: int, layout: Hashable) -> Any:
        """The record of a later size, which nobody traces: all first ones are of one form; None: they are not."""
        if self._form is None or tokens < LEAST or layout in self._first:
            return None
        casts = next(iter(self._first.values())).casts

        def program(number: int) -> Any:
            return casts if number == _CASTS else _Later(self, number, tokens, None)

        given, _, made = back(put_in(self._form.record, tokens), program)
        return made if given == layout else None

    def program(
        self, number: int, tokens: int, graph: fx.Graph | None, tensors: Sequence[torch.Tensor]
    ) -> Program:
        """Program ``number`` for ``tokens`` tokens and tensors laid out like these.

        ``graph``: what was traced for that size; None: nothing was, and it is that of the first sizes' form.
        """
        sized = self._sized(number, tokens, graph)
        shared = self._shared.setdefault(number, [])
        if sized is not None and tokens >= LEAST and sized.fits(tokens, tensors):
            for one in shared:
                if one.serves(tokens, sized):
                    return partial(one, tokens)
            if len(shared) < _MOST_SHARED:
                try:
                    shared.append(SizedProgram(sized, tokens, tensors))
                except NotCompiledError as error:
                    logger.info("memo: %d tokens are compiled by themselves: %s", tokens, error)
                else:
                    return partial(shared[-1], tokens)
        if graph is None:
            assert sized is not None, "it has a form"
            graph = sized.graph(tokens)
        return self.alone(graph)

    def _sized(self, number: int, tokens: int, graph: fx.Graph | None) -> Sized | None:
        """The graph with its sizes as those of tokens, from two of the first sizes; None: they have no such graph."""
        if graph is None:
            assert self._form is not None, "only a form makes programs without a trace"
            return self._form.graphs[number]
        reading = read(graph)
        there = [one for one in self._first.values() if number < len(one.graphs) and one.tokens != tokens]
        for first, second in combinations(there, 2):
            sized = Sized.between((first.tokens, first.graphs[number]), (second.tokens, second.graphs[number]))
            if sized is not None and sized.at(tokens) == reading:
                return sized
        return None


@dataclass(frozen=True, slots=True)
class _Form:
    """What all first sizes have in common, with ``Line``s for numbers: of their records, and of their graphs."""

    record: Any
    graphs: tuple[Sized, ...]


def _form_of(sizes: Sequence[_Size]) -> _Form | None:
    """Two give it, and all others, one at least, are of it; None: they are not."""
    if len({one.tokens for one in sizes}) < _PROOF or len({len(one.graphs) for one in sizes}) > 1:
        return None
    first = sizes[0]
    second = next(one for one in sizes if one.tokens != first.tokens)
    record = in_common((first.tokens, first.record), (second.tokens, second.record))
    pairs = zip(first.graphs, second.graphs, strict=True)
    graphs = [Sized.between((first.tokens, one), (second.tokens, other)) for one, other in pairs]
    found = tuple(graph for graph in graphs if graph is not None)
    if record is None or len(found) < len(graphs):
        return None
    for one in sizes:
        if put_in(record, one.tokens) != one.record or [graph.at(one.tokens) for graph in found] != one.graphs:
            return None
    return _Form(record, found)
