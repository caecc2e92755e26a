"""Granules, whole prefixes, and tails of one token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memo_runtime.planning.rounding import granule, prefix_of


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, 1), (7, 1), (8, 1), (15, 1), (16, 2), (64, 8), (1000, 64), (1023, 64), (1024, 128), (10**6, 128)],
)
def test_granule(tokens, expected):
    assert granule(tokens) == expected


def test_a_fraction_is_rounded_down_to_whole_granules():
    assert prefix_of(0.37, 4096) == 1408
    assert prefix_of(0.1, 1280) == 128
    assert prefix_of(0.3, 1280) == 384
    assert prefix_of(0.0, 1280) == 0


def test_one_is_every_token_also_between_granules():
    assert prefix_of(1.0, 1001) == 1001
    assert prefix_of(0.9999, 1001) < 1000


def test_a_tail_of_one_token_is_avoided():
    assert prefix_of(0.9999, 1025) == 896
    assert prefix_of(0.9, 9) == 8 - 1
    assert prefix_of(0.5, 2) == 0
    assert prefix_of(0.5, 1) == 0


@given(st.floats(0, 1), st.integers(2, 10**6))
def test_every_prefix_is_allowed(alpha, tokens):
    prefix = prefix_of(alpha, tokens)
    assert prefix == tokens or (prefix % granule(tokens) == 0 and prefix <= alpha * tokens + 1e-5)
    assert tokens - prefix != 1
