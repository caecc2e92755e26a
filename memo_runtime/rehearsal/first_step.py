"""The first step of a rehearsal on a few tiles, instead of the whole length, where the plan is that of the whole.

Programs, kernels and the optimizer's states are the same at any length, and the plan is made and its host memory pinned
by then. So one whole step is enough, which is what is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from memo_runtime.blocks.containers import leaves_of
from memo_runtime.errors import ArgumentError
from memo_runtime.records import Plan
from memo_runtime.wrapping import Batch, Wrapped

#: From a number of tokens to a batch.
Shorter = Callable[[int], Any]
#: Whole tiles of the short step: the first, the last and those between run by programs of their own.
_TILES = 3
#: Tokens that stand for a tile where blocks do not run by tiles.
_TOKENS = 1024
#: A step of more than this share of the tokens is no short one.
_SHORT = 0.25


def few_tokens(plan: Plan | None) -> int | None:
    """Tokens of a short step under ``plan``, with the remainder of a tile that the whole has; None: none is short."""
    if plan is None or not plan.seq_len:
        return None
    tile = max((block.tile for block in plan.blocks), default=0) or _TOKENS
    few = _TILES * tile + plan.seq_len % tile
    return few if few <= _SHORT * plan.seq_len else None


def check_short(short: Batch, whole: Batch, few: int, tokens: int) -> None:
    """Raise where ``short`` is no batch of ``few`` tokens as ``whole`` is one of ``tokens``, as far as shapes say that.

    Raises:
        ArgumentError: says which shapes were expected, and which came.
    """
    pairs = [
        (made, given)
        for made, given in zip(leaves_of(short), leaves_of(whole), strict=False)
        if isinstance(made, torch.Tensor) and isinstance(given, torch.Tensor) and made.dim() == given.dim()
    ]
    # A hidden size may be that of the sequence, and stays; what models make tokens of (patches) has other sizes.
    came = {size for made, given in pairs for size, had in zip(made.shape, given.shape, strict=True) if had == tokens}
    if not came or (few in came and came <= {few, tokens}):
        return
    raise ArgumentError(
        f"shorter= was asked for a batch of {few:,} tokens, as the whole one is of {tokens:,}: tensors of shapes "
        f"{[list(given.shape) for _, given in pairs]} came as {[list(made.shape) for made, _ in pairs]}"
    )


@contextlib.contextmanager
def under_plan(wrapped: Wrapped) -> Iterator[None]:
    """Steps of any length run under the plan that is in force."""
    given, wrapped.given_plan = wrapped.given_plan, wrapped.session.plan
    try:
        yield
    finally:
        wrapped.given_plan = given
