"""Reading from a batch how many sequences and tokens it has, so that a known profile serves for other shapes.

A profile knows the sequences (rows) and tokens of every stack of its own batch. Wherever a dimension of that batch has
one of these sizes, a later batch has its own number in the same place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memo_runtime.profiling.candidates import MIN_TOKENS
from memo_runtime.profiling.measured import Measured
from memo_runtime.records import BlockProfile

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Dimensions [first, last) of tensor ``leaf``; two of them where a model packs its sequences into one."""

    leaf: int
    first: int
    last: int

    def size(self, shapes: Shapes) -> int:
        """Elements along them."""
        return math.prod(shapes[self.leaf][self.first : self.last])


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sequences and tokens of the stacks that have other ones than in the measured batch, by stack index."""

    rows: dict[int, int]
    tokens: dict[int, int]


@dataclass(frozen=True, slots=True)
class Reading:
    """A measured batch, by the shapes of its tensors."""

    measured: Measured
    shapes: Shapes

    def sizes_of(self, shapes: Shapes) -> Sizes | None:
        """Rows and tokens of a batch of ``shapes``, which has the same tensors with the same ranks.

        None where they cannot be read: two places disagree, or something changed and nothing known explains it.
        """
        rows: dict[int, int] = {}
        tokens: dict[int, int] = {}
        explained: set[tuple[int, int]] = set()
        # A block whose input was empty says nothing about other shapes.
        unseen = any(not block.tokens for block in self.measured.profile.blocks)
        for stack, rows_there, tokens_there in self._stacks():
            old_rows, old_tokens = rows_there[0], tokens_there[0]
            row_places, token_places = self._places(old_rows, old_tokens)
            for places, old, all_old, found in (
                (row_places, old_rows, rows_there, rows),
                (token_places, old_tokens, tokens_there, tokens),
            ):
                if old is None:
                    continue
                new = _one_value(old, [place.size(shapes) for place in places])
                unseen = unseen or not places
                explained.update((p.leaf, dim) for p in places for dim in range(p.first, p.last))
                if new == old:
                    continue
                # Blocks of one stack that see different sizes (a pyramid) do not follow from the first one's.
                if not new or len(set(all_old)) > 1 or (found is tokens and old < MIN_TOKENS):
                    return None
                found[stack] = new
        if unseen and any(place not in explained for place in self._changed(shapes)):
            return None
        return Sizes(rows, tokens)

    def knows(self, sizes: Sizes) -> bool:
        """What blocks save at ``sizes`` was measured or follows from what was; else it is an estimate."""
        return self.measured.certain(sizes.rows, sizes.tokens)

    def _stacks(self) -> Iterator[tuple[int, list[int | None], list[int]]]:
        """(stack, rows, tokens) of every stack; rows and tokens of each of its blocks with an input."""
        measured = self.measured
        stacks: dict[int, list[BlockProfile]] = {}
        for block in measured.profile.blocks:
            if block.tokens:
                stacks.setdefault(block.stack, []).append(block)
        for stack, blocks in stacks.items():
            yield stack, [measured.rows_of(block) for block in blocks], [block.tokens for block in blocks]

    def _places(self, rows: int | None, tokens: int) -> tuple[list[Place], list[Place]]:
        """Places of the rows and of the tokens: the first dimension is of rows where both have the same size."""
        row_places: list[Place] = []
        if rows is not None:
            row_places = [Place(leaf, 0, 1) for leaf, shape in enumerate(self.shapes) if shape and shape[0] == rows]
            if not row_places and rows != tokens:
                row_places = self._of_size(rows)
        token_places = [place for place in self._of_size(tokens) if place not in row_places]
        return row_places, token_places

    def _of_size(self, size: int) -> list[Place]:
        """Dimensions of ``size``; failing that, tensors whose first two have it together."""
        single = [
            Place(leaf, dim, dim + 1)
            for leaf, shape in enumerate(self.shapes)
            for dim, found in enumerate(shape)
            if found == size
        ]
        packed = (Place(leaf, 0, 2) for leaf, shape in enumerate(self.shapes) if len(shape) > 1)
        return single or [place for place in packed if place.size(self.shapes) == size]

    def _changed(self, shapes: Shapes) -> Iterator[tuple[int, int]]:
        for leaf, (old, new) in enumerate(zip(self.shapes, shapes, strict=True)):
            yield from ((leaf, dim) for dim, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)


def _one_value(old: int, values: Sequence[int]) -> int | None:
    """What a size became, from every place that had it; places that kept it may be of something else."""
    changed = set(values) - {old}
    if len(changed) > 1:
        return None
    return changed.pop() if changed else old
