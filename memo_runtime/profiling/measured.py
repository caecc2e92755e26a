"""A profile together with what carries it to other batch sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from memo_runtime.profiling.growth import line_through, times
from memo_runtime.profiling.pairs import PairLaw
from memo_runtime.profiling.rows import RowLaw, tiled_at
from memo_runtime.records import BlockProfile, Growth, LongEnd, Profile, TiledProfile


@dataclass(frozen=True, slots=True)
class Measured:
    """A profile, and by block name how it changes with the number of sequences.

    Attributes:
        pairs: by name of those blocks that are given tensors as long as another stack's sequence, how that length
            changes them.
        shared_by_all: the part of ``profile.shared`` that does not grow with the number of sequences.
        tiles: what blocks take by tiles, by name and number of sequences, where that was seen. One number does not
            tell what sequences share (position biases, masks), so at others it is an estimate.
        each_time: names of blocks that are run in every pass (``Walk``).
    """

    profile: Profile
    laws: Mapping[str, RowLaw]
    pairs: Mapping[str, PairLaw] = field(default_factory=dict)
    shared_by_all: Growth = field(default_factory=Growth)
    tiles: Mapping[tuple[str, int], TiledProfile] = field(default_factory=dict)
    each_time: frozenset[str] = frozenset()

    def rows_of(self, block: BlockProfile) -> int | None:
        """Sequences in the profiled input of ``block``; None where they cannot be told from tokens."""
        law = self.laws[block.name]
        return law.rows if law.row_dim is not None else None

    def block(self, name: str) -> BlockProfile | None:
        """The profile of one block; None: it was not called."""
        return next((block for block in self.profile.blocks if block.name == name), None)

    def with_tiles_of(self, seen: Profile, rows: Mapping[int, int]) -> Measured:
        """The same with what blocks take by tiles in ``seen``, which is this profile ``at_rows(rows)`` beside that."""
        found = {(block.name, self._rows_in(block, rows)): block.tiled for block in seen.blocks if block.tiled}
        blocks = tuple(
            replace(block, tiled=tiled_at(other.tiled, 1 / self._ratio(block, rows)), tiled_reason=other.tiled_reason)
            for block, other in zip(self.profile.blocks, seen.blocks, strict=True)
        )
        tiles = {**self.tiles, **found}
        blocks = tuple(self._as_seen(block, self.laws[block.name].rows, tiles) for block in blocks)
        return replace(self, profile=replace(self.profile, blocks=blocks), tiles=tiles)

    def tiles_left_for_later(self, rows: Mapping[int, int]) -> bool:
        """What blocks take by tiles with ``rows`` sequences by stack follows from other numbers only."""
        by_tiles = (block for block in self.profile.blocks if block.tiled is not None)
        return any((block.name, self._rows_in(block, rows)) not in self.tiles for block in by_tiles)

    def left_for_later(self, rows: Mapping[int, int]) -> bool:
        """Stacks that have other numbers of sequences now, ``rows``, were only seen with their own."""
        return any(not self.laws[block.name].seen for block in self.profile.blocks if block.stack in rows)

    def pairs_left_for_later(self, rows: Mapping[int, int], tokens: Mapping[int, int]) -> bool:
        """Blocks are given sequences of another length now, by ``tokens``, and were only seen with their own."""
        return any(not law.seen and law.stack in tokens and not rows for law in self.pairs.values())

    def certain(self, rows: Mapping[int, int], tokens: Mapping[int, int]) -> bool:
        """Sizes where the stacks in ``rows`` and ``tokens`` have others now follow from measured ones."""
        by_rows = all(
            self.laws[block.name].certain or block.stack not in rows
            for block in self.profile.blocks
            if block.tokens and not block.dynamic
        )
        return by_rows and all(self._pair_is_certain(law, rows, tokens) for law in self.pairs.values())

    def _pair_is_certain(self, law: PairLaw, rows: Mapping[int, int], tokens: Mapping[int, int]) -> bool:
        if law.stack is None:
            return not tokens
        return law.stack not in tokens or (law.certain and not rows)

    def at(self, rows: Mapping[int, int], tokens: Mapping[int, int]) -> Profile:
        """The profile where stack i has ``rows[i]`` sequences, and gives others ``tokens[i]`` tokens; others stay."""
        profile = self.profile
        given = {
            name: (law, tokens[law.stack])
            for name, law in self.pairs.items()
            if law.stack is not None and law.stack in tokens
        }
        if given:
            most = max(1.0, *(length / law.length for law, length in given.values()))
            profile = replace(
                profile,
                blocks=tuple(
                    law_and_length[0].at(block, law_and_length[1]) if law_and_length else block
                    for block, law_and_length in ((b, given.get(b.name)) for b in profile.blocks)
                ),
                shared=replace(profile.shared, constant=profile.shared.constant * most),
            )
        return replace(self, profile=profile).at_rows(rows)

    def at_rows(self, rows: Mapping[int, int]) -> Profile:
        """The profile for a batch in which the input of stack i has ``rows[i]`` sequences; others stay."""
        profile = self.profile
        numbers = [self._rows_in(block, rows) for block in profile.blocks]
        pairs = tuple(zip(profile.blocks, numbers, strict=True))
        blocks = tuple(self._as_seen(self.laws[one.name].at(one, number), number, self.tiles) for one, number in pairs)
        if blocks == profile.blocks:
            return profile
        first, last = (next(b for b in order if b.tokens) for order in (profile.blocks, profile.blocks[::-1]))
        to_first, to_last = (self._ratio(block, rows) for block in (first, last))
        return replace(
            profile,
            blocks=blocks,
            rows=max(1, int(profile.rows * to_first)),
            shared=line_through(self.shared_by_all, profile.shared, to_last),
            outside_forward=times(profile.outside_forward, to_last),
            entry=times(profile.entry, to_last),
            outside_peak=times(profile.outside_peak, to_last),
            loss_peak=times(profile.loss_peak, to_last),
            long_end=_long_end_at(profile.long_end, to_last),
            result=times(profile.result, to_last),
            outside_seconds=times(profile.outside_seconds, to_last),
        )

    def at_tokens(self, tokens: Mapping[int, int]) -> Measured:
        """The same where the sequences of stack i have ``tokens[i]`` tokens; others stay."""
        profile = self.at({}, tokens)
        blocks = tuple(
            replace(block, tokens=tokens.get(block.stack, block.tokens)) if block.tokens else block
            for block in profile.blocks
        )
        pairs = {
            name: replace(law, length=tokens.get(law.stack, law.length)) if law.stack is not None else law
            for name, law in self.pairs.items()
        }
        return replace(self, profile=replace(profile, blocks=blocks), pairs=pairs)

    def _ratio(self, block: BlockProfile, rows: Mapping[int, int]) -> Fraction:
        return Fraction(self._rows_in(block, rows), self.laws[block.name].rows)

    def _rows_in(self, block: BlockProfile, rows: Mapping[int, int]) -> int:
        return rows.get(block.stack, self.laws[block.name].rows)

    @staticmethod
    def _as_seen(block: BlockProfile, rows: int, tiles: Mapping[tuple[str, int], TiledProfile]) -> BlockProfile:
        return replace(block, tiled=tiles.get((block.name, rows), block.tiled)) if block.tiled is not None else block


def cautious(profile: Profile) -> Profile:
    """``profile`` for calls of which nothing is known but that they have its blocks: each is run again as a whole."""
    reason = "it was called with another kind of batch, which was not profiled"
    return replace(
        profile,
        blocks=tuple(
            replace(
                block,
                sliceable=False, replayable=False, dynamic=True,
                random=True, stateful=True, draws=True, reason=reason,
            )
            for block in profile.blocks
        ),
    )


def _long_end_at(end: LongEnd | None, ratio: Fraction) -> LongEnd | None:
    """``end`` for ``ratio`` times as many sequences: a state is as long at fewer tokens, and a tile has all of them."""
    if end is None:
        return None
    behind = times(end.outside_peak, ratio)
    behind = replace(behind, constant=float(behind.constant * ratio))
    return LongEnd(tokens=math.ceil(end.tokens / ratio), outside_peak=behind, loss_peak=times(end.loss_peak, ratio))
