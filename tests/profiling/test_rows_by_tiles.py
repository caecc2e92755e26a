"""What a block takes by tiles for more sequences than were profiled, against a profile of so many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from fractions import Fraction
from typing import Any

from memo_runtime.profiling.rows import tiled_at
from memo_runtime.records import Growth
from tests.execution.test_tiled_peak import TOKENS, Kind, Stack
from tests.tiny import few_samples

__all__ = ["few_samples"]


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number in a record, growths at one length."""
    if isinstance(value, tuple):
        for index, one in enumerate(value):
            yield from numbers(one, f"{name}[{index}]")
    elif is_dataclass(value) and not isinstance(value, Growth):
        for field in fields(value):
            yield from numbers(getattr(value, field.name), f"{name}.{field.name}")
    else:
        yield name, value.at(TOKENS) if isinstance(value, Growth) else value


def test_all_that_grows_with_sequences_does() -> None:
    """Heads in groups too. Of several sequences the rows of a tile do not lie together: their copies are not told."""
    one, three = (Stack(Kind(shared=2, rows=rows)).takes[0] for rows in (1, 3))
    assert three.heads == 2
    assert three.forward_by_groups
    found = tiled_at(one, Fraction(3))
    for (name, right), (_, scaled) in zip(numbers(three), numbers(found), strict=True):
        assert scaled == right or (name.endswith((".tile", ".alone")) and scaled < right), name
