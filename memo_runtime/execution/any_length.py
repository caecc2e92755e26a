"""Compiled programs for tiles of any number of tokens.

The first sizes of a segment's tiles are compiled each for itself. A run whose batches all have other lengths would
go on so at every step, for seconds; so later sizes share programs, which take the number of tokens as an argument.
Every size in their graph is ``slope * tokens + offset``, found from two graphs that were traced (``sized_graph.py``).
A tile is served by one only if the graph that is traced for it is that very graph with its number put in, and if what
TorchInductor took for granted of the number (a range, mostly) holds of it; else it is compiled by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations

import torch
from torch import fx

from memo_runtime.execution.compilers import Compiler, NotCompiledError, Program, is_switched_off
from memo_runtime.execution.sized_graph import Reading, Sized, read
from memo_runtime.execution.sized_program import LEAST, SizedProgram

logger = logging.getLogger("memo_runtime")

#: Sizes that are compiled each for itself; those of a step are among them, where all have one length.
_ALONE = 4
#: Programs that serve many sizes, each within what TorchInductor takes for granted.
_MOST_SHARED = 4


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

    def __init__(self, lengths: AnyLength, number: int, tokens: int, graph: fx.Graph) -> None:
        self._asked: tuple[AnyLength, int, int, fx.Graph] | None = (lengths, number, tokens, graph)
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
        #: By number of a program among those of a size.
        self._shared: dict[int, list[SizedProgram]] = {}

    def compiler(self, tokens: int, layout: Hashable) -> Compiler:
        """For the programs of tiles of ``tokens`` tokens, laid out in memory like ``layout``."""
        if layout in self._first:
            self._first[layout].asked = 0
        elif len(self._first) < _ALONE or is_switched_off():
            self._first[layout] = _Size(self, tokens, shares=False)
        return self._first.get(layout) or _Size(self, tokens, shares=True)

    def program(self, number: int, tokens: int, graph: fx.Graph, tensors: Sequence[torch.Tensor]) -> Program:
        """Program ``number`` for ``tokens`` tokens, which is ``graph``, for tensors laid out like these."""
        reading = read(graph)
        shared = self._shared.setdefault(number, [])
        for one in shared:
            if one.serves(tokens, reading, tensors):
                return partial(one, tokens)
        if len(shared) < _MOST_SHARED and tokens >= LEAST:
            sized = self._sized(number, tokens, reading)
            if sized is not None and sized.fits(tokens, tensors):
                try:
                    shared.append(SizedProgram(sized, tokens, tensors))
                except NotCompiledError as error:
                    logger.info("memo: %d tokens are compiled by themselves: %s", tokens, error)
                else:
                    return partial(shared[-1], tokens)
        return self.alone(graph)

    def _sized(self, number: int, tokens: int, reading: Reading) -> Sized | None:
        """The graph with its sizes as those of tokens, from two of the first sizes; None: they have no such graph."""
        there = [one for one in self._first.values() if number < len(one.graphs) and one.tokens != tokens]
        for first, second in combinations(there, 2):
            sized = Sized.between((first.tokens, first.graphs[number]), (second.tokens, second.graphs[number]))
            if sized is not None and sized.at(tokens) == reading:
                return sized
        return None
