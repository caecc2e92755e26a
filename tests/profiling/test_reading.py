"""Where in a batch rows and tokens are read, and when they cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memo_runtime.profiling.measured import Measured
from memo_runtime.profiling.reading import Reading, Shapes, Sizes
from memo_runtime.profiling.rows import RowLaw
from tests.planning.builders import llama_block, profile_of


def reading(*stacks: tuple[int | None, int], shapes: Shapes) -> Reading:
    """A batch of ``shapes`` in which stack i has (rows, tokens)."""
    blocks = [
        replace(llama_block(number, stack=number), tokens=tokens, name=f"b{number}")
        for number, (_, tokens) in enumerate(stacks)
    ]
    laws = {
        f"b{number}": RowLaw(None if rows is None else 0, rows or 1, certain=True)
        for number, (rows, _) in enumerate(stacks)
    }
    return Reading(Measured(profile_of(blocks), laws), shapes)


@pytest.mark.parametrize(
    ("old", "new", "rows", "tokens"),
    [
        (((2, 24), (2, 24)), ((2, 24), (2, 24)), {}, {}),
        (((2, 24), (2, 24)), ((2, 31), (2, 31)), {}, {0: 31}),
        (((2, 24), (2, 24)), ((3, 24), (3, 24)), {0: 3}, {}),
        (((2, 24), (2, 24)), ((1, 99), (1, 99)), {0: 1}, {0: 99}),
        (((2, 24, 8),), ((5, 7, 8),), {0: 5}, {0: 7}),
        (((24, 2, 8),), ((7, 5, 8),), {0: 5}, {0: 7}),  # tokens first
        (((2, 24), (2, 1, 24, 24)), ((3, 9), (3, 1, 9, 9)), {0: 3}, {0: 9}),
        (((2, 24), (1, 1, 24, 24)), ((3, 9), (1, 1, 9, 9)), {0: 3}, {0: 9}),
        (((2, 24), (7,)), ((2, 31), (9,)), {}, {0: 31}),  # what is not known does not matter
        (((2, 24), (48,)), ((3, 10), (30,)), {0: 3}, {0: 10}),
    ],
)
def test_a_batch_tells_its_sizes(old: Shapes, new: Shapes, rows: dict[int, int], tokens: dict[int, int]) -> None:
    assert reading((2, 24), shapes=old).sizes_of(new) == Sizes(rows, tokens)


def test_as_many_sequences_as_tokens() -> None:
    assert reading((4, 4), shapes=((4, 4),)).sizes_of(((4, 9),)) == Sizes({}, {0: 9})
    assert reading((4, 4), shapes=((4, 4),)).sizes_of(((9, 4),)) == Sizes({0: 9}, {})


def test_features_as_many_as_tokens() -> None:
    assert reading((2, 8), shapes=((2, 8, 8),)).sizes_of(((2, 5, 8),)) == Sizes({}, {0: 5})


def test_a_packed_sequence_of_all_rows() -> None:
    assert reading((None, 48), shapes=((2, 24),)).sizes_of(((3, 10),)) == Sizes({}, {0: 30})


def test_two_stacks_of_other_lengths() -> None:
    known = reading((2, 24), (2, 20), shapes=((2, 24), (2, 20)))
    assert known.sizes_of(((2, 31), (2, 20))) == Sizes({}, {0: 31})
    assert known.sizes_of(((5, 31), (5, 9))) == Sizes({0: 5, 1: 5}, {0: 31, 1: 9})


def test_what_cannot_be_read() -> None:
    images = reading((2, 26), shapes=((2, 3, 20, 20),))
    assert images.sizes_of(((5, 3, 20, 20),)) == Sizes({0: 5}, {})
    assert images.sizes_of(((2, 3, 28, 28),)) is None, "how many patches a larger image has is not in the batch"
    known = reading((2, 24), shapes=((2, 24), (2, 24)))
    assert known.sizes_of(((2, 31), (2, 30))) is None, "two places disagree"
    assert known.sizes_of(((0, 24), (0, 24))) is None
    short = reading((2, 3), shapes=((2, 3),))
    assert short.sizes_of(((2, 9),)) is None, "so few tokens are never sliced"
    assert short.sizes_of(((5, 3),)) == Sizes({0: 5}, {})


def test_blocks_of_one_stack_with_other_lengths_do_not_follow_from_the_first() -> None:
    known = reading((2, 24), (2, 12), shapes=((2, 24),))
    blocks = tuple(replace(block, stack=0) for block in known.measured.profile.blocks)
    pyramid = replace(known, measured=replace(known.measured, profile=replace(known.measured.profile, blocks=blocks)))
    assert pyramid.sizes_of(((2, 48),)) is None
    assert pyramid.sizes_of(((3, 24),)) == Sizes({0: 3}, {})
