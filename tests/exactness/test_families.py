"""Hugging Face families: every policy in one shape, one policy in the other shapes."""

from __future__ import annotations

import pytest

from tests.exactness.compare import ENDS, MEMO, OTHER_WAYS, RECOMPUTE, SWAP, Way, assert_exact
from tests.exactness.models import FAMILIES

#: For whom what hardly depends on the family is tried in CI: a plain one, two stacks, blocks that fall back.
SOME = ("llama", "t5", "mixtral")


@pytest.mark.parametrize(("family", "way"), [
    *((family, MEMO) for family in FAMILIES),
    *(pytest.param(family, RECOMPUTE, marks=() if family in SOME else pytest.mark.slow) for family in FAMILIES),
    *(pytest.param(family, one, marks=pytest.mark.slow) for family in FAMILIES for one in (SWAP, *ENDS)),
], ids=str)  # fmt: skip
def test_every_policy(family: str, way: Way) -> None:
    """Three sequences of an odd length, dropout on."""
    made = FAMILIES[family]
    assert_exact(made.make(), made.batch(rows=3, tokens=29), way, fallback=made.fallback)


@pytest.mark.parametrize("family", SOME)
def test_a_swap_of_everything(family: str) -> None:
    made = FAMILIES[family]
    assert_exact(made.make(), made.batch(rows=3, tokens=29), SWAP, fallback=made.fallback)


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=() if one in SOME else pytest.mark.slow) for one in FAMILIES]
)
def test_one_row(family: str) -> None:
    made = FAMILIES[family]
    assert_exact(made.make(), made.batch(rows=1, tokens=33), MEMO, fallback=made.fallback)


#: Masks of a decoder, of windows, and of an encoder; those of the others without dropout in evaluation mode below.
PADDED = ("llama", "gemma3", "bert")


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in PADDED else pytest.mark.slow)
     for name, made in FAMILIES.items() if made.pads],
)  # fmt: skip
def test_padded_rows(family: str) -> None:
    made = FAMILIES[family]
    assert_exact(made.make(), made.batch(rows=3, tokens=29, padded=True), MEMO, fallback=made.fallback)


@pytest.mark.parametrize("way", OTHER_WAYS, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "t5", "mixtral"])
def test_evaluation_mode_with_gradients(family: str, way: Way) -> None:
    made = FAMILIES[family]
    assert_exact(
        made.make().eval(), made.batch(rows=2, tokens=17, padded=True), way, fallback=made.fallback
    )
