"""What a block takes by tiles for more sequences than were profiled, against a profile of so many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.lookup import find_wrapped
from memo_runtime.profiling.rows import tiled_at
from memo_runtime.records import Growth, Profile
from tests.api.subjects import step
from tests.api.towers import HIDDEN, Block, signal
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


class Biased(Block):
    """Attention that is written out, with a bias of all pairs that is given and a causal mask that is made here."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        q, k, v = (part.view(rows, tokens, 4, -1).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        at = torch.arange(tokens)
        scores = (q @ k.transpose(-1, -2) + bias).masked_fill(at[None] > at[:, None], -1e9)
        mixed = scores.softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, tokens, HIDDEN))
        return x + self.mlp(x)


class Model(nn.Module):
    """As T5: all sequences share the bias, which is made in front of the blocks and is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slopes = nn.Linear(8, HIDDEN), nn.Parameter(torch.rand(4, 1, 1))
        self.layers = nn.ModuleList([Biased(), Biased()])

    def forward(self, x: Tensor) -> Tensor:
        at, x = torch.arange(x.shape[1], dtype=x.dtype), self.first(x)
        bias = (-self.slopes * (at[None] - at[:, None]).abs())[None]
        for layer in self.layers:
            x = layer(x, bias)
        return x


def wrapped() -> Model:
    torch.manual_seed(0)
    return memo.wrap(Model().double(), policy="tiled", tile=8)


def planned(model: Model, rows: int) -> Profile:
    """What a step of so many sequences is planned from; its own bytes are those of the plan."""
    step(model, signal(rows=rows, tokens=24))
    totals = memo.report(model).totals
    assert totals.bytes_kept == totals.forecast.bytes_kept
    assert totals.stash_peak_bytes == totals.forecast.stash_peak_bytes
    plan = find_wrapped(model).session.plan  # type: ignore[union-attr]
    assert plan is not None
    return plan.profile


def test_what_sequences_share_does_not_follow_their_number() -> None:
    """A step of another number of sequences is planned as if the model had seen that number first."""
    model = wrapped()
    planned(model, 3)
    takes, fresh = ([block.tiled for block in planned(one, 2).blocks] for one in (model, wrapped()))
    assert takes == fresh
    assert find_wrapped(model).profiled == 1  # type: ignore[union-attr]
