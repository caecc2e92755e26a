"""Hugging Face families: every policy in one shape, one policy in the other shapes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.exactness.compare import MAIN_WAYS, MEMO, WAYS, Way, assert_exact
from tests.exactness.models import FAMILIES


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_policy(family: str, way: Way) -> None:
    """Three sequences of an odd length, dropout on."""
    made = FAMILIES[family]
    assert_exact(made.make(), made.batch(rows=3, tokens=29), way, fallback=made.fallback)


@pytest.mark.parametrize(
    ("shape", "way"),
    [({"rows": 1, "tokens": 33}, MEMO), ({"rows": 3, "tokens": 29, "padded": True}, MEMO)],
    ids=["one-row", "padded"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_shapes(family: str, shape: dict[str, Any], way: Way) -> None:
    made = FAMILIES[family]
    if shape.get("padded") and not made.pads:
        pytest.skip("images are not padded")
    assert_exact(made.make(), made.batch(**shape), way, fallback=made.fallback)


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "t5", "mixtral"])
def test_evaluation_mode_with_gradients(family: str, way: Way) -> None:
    made = FAMILIES[family]
    assert_exact(
        made.make().eval(), made.batch(rows=2, tokens=17, padded=True), way, fallback=made.fallback
    )
