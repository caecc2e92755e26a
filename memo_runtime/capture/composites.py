"""Operators that are made of others and have no rule of their own (``rules.py``): traced as what they are made of.

A trace keeps operators whole (``linear``), and what nobody has a rule for is refused. These say nothing that their
parts do not. Left whole: what users name with ``memo.register_mixer`` (``conv1d``), what loops over tokens (``lstm``),
what chooses among values (``quantile``), since a choice that is made again may be another, and what autocast has by
name (``cosine_similarity`` in float32, ``tensordot`` in its operands' widest dtype): parts would be cast one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from memo_runtime.blocks.operators import is_registered_mixer

_NAMES = (
    "atleast_1d atleast_2d atleast_3d broadcast_tensors concatenate diff dsplit dstack hsplit hstack moveaxis movedim"
    " narrow pairwise_distance reshape_as swapdims tile trapezoid view_as vsplit vstack"
)


@cache
def _parts() -> dict[Any, Callable[..., Any]]:
    found: dict[Any, Callable[..., Any]] = {}
    for packet in (getattr(torch.ops.aten, name) for name in _NAMES.split()):
        overloads = [getattr(packet, overload) for overload in packet.overloads()]
        found |= {one: one.decompose for one in overloads if not one._schema.is_mutable}
    return found


def composites() -> dict[Any, Callable[..., Any]]:
    """For ``make_fx``: what to run in place of each; one that was named a mixer stays whole."""
    return {operator: parts for operator, parts in _parts().items() if not is_registered_mixer(str(operator))}
