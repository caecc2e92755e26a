"""A profile together with what carries it to other batch sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from memo_runtime.profiling.growth import line_through, times
from memo_runtime.profiling.rows import RowLaw
from memo_runtime.records import BlockProfile, Growth, Profile


@dataclass(frozen=True, slots=True)
class Measured:
    """A profile, and by block name how it changes with the number of sequences.

    Attributes:
        shared_by_all: the part of ``profile.shared`` that does not grow with them.
        crossed: blocks of one stack are given tensors as long as another's sequence, so that their sizes depend on two
            lengths, of which only their own was varied.
    """

    profile: Profile
    laws: Mapping[str, RowLaw]
    shared_by_all: Growth = field(default_factory=Growth)
    crossed: bool = False

    def rows_of(self, block: BlockProfile) -> int | None:
        """Sequences in the profiled input of ``block``; None where they cannot be told from tokens."""
        law = self.laws[block.name]
        return law.rows if law.row_dim is not None else None

    def block(self, name: str) -> BlockProfile | None:
        """The profile of one block; None: it was not called."""
        return next((block for block in self.profile.blocks if block.name == name), None)

    def left_for_later(self, rows: Mapping[int, int]) -> bool:
        """Stacks that have other numbers of sequences now, ``rows``, were only seen with their own."""
        return any(not self.laws[block.name].seen for block in self.profile.blocks if block.stack in rows)

    def certain(self, rows: Mapping[int, int]) -> bool:
        """Sizes at ``rows`` sequences, for the stacks that have others now, follow from measured ones."""
        return all(
            self.laws[block.name].certain or block.stack not in rows
            for block in self.profile.blocks
            if block.tokens and not block.dynamic
        )

    def at_rows(self, rows: Mapping[int, int]) -> Profile:
        """The profile for a batch in which the input of stack i has ``rows[i]`` sequences; others stay."""
        profile = self.profile
        blocks = tuple(
            self.laws[block.name].at(block, rows.get(block.stack, self.laws[block.name].rows))
            for block in profile.blocks
        )
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
            outside_peak=times(profile.outside_peak, to_last),
            outside_seconds=times(profile.outside_seconds, to_last),
        )

    def at_tokens(self, tokens: Mapping[int, int]) -> Measured:
        """The same where the sequences of stack i have ``tokens[i]`` tokens; others stay."""
        blocks = tuple(
            replace(block, tokens=tokens.get(block.stack, block.tokens)) if block.tokens else block
            for block in self.profile.blocks
        )
        return replace(self, profile=replace(self.profile, blocks=blocks))

    def _ratio(self, block: BlockProfile, rows: Mapping[int, int]) -> Fraction:
        old = self.laws[block.name].rows
        return Fraction(rows.get(block.stack, old), old)


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
