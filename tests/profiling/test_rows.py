"""A profile at other batch sizes: measured where blocks do not save in proportion to them, exact to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.lookup import find_wrapped
from tests.api.main_ways import MAIN_POLICIES
from tests.api.subjects import assert_close, assert_nothing_held, step
from tests.api.towers import HIDDEN, POLICIES, Block, signal
from tests.tiny import few_samples

__all__ = ["few_samples"]

HEADS = 4


class PositionBias(Block):
    """Adds a bias to the scores that all sequences share: [1, heads, tokens, tokens], made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.rand(HEADS))

    def bias(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], dtype=x.dtype)
        distance = (at[None] - at[:, None]).abs()
        return (-self.slopes[:, None, None] * distance).sigmoid()[None]

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        q, k, v = (
            p.view(rows, tokens, HEADS, -1).transpose(1, 2) for p in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        scores = (q @ k.transpose(-1, -2) + self.bias(x)).softmax(-1)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(rows, tokens, HIDDEN))
        return x + self.mlp(x)


class Table(Block):
    """Multiplies with what it makes of the length alone: saved once, whatever the batch."""

    def forward(self, x: Tensor) -> Tensor:
        table = (torch.arange(x.shape[1], dtype=x.dtype)[:, None] * self.norm.weight).sin()
        return super().forward(x * table.exp())


class TimeFirst(Block):
    """[tokens, rows, features]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class Contrast(Block):
    """Compares every sequence with every other: [rows, rows, tokens]."""

    def forward(self, x: Tensor) -> Tensor:
        alike = torch.einsum("ath,bth->abt", x, x).softmax(1)
        return super().forward(x + torch.einsum("abt,bth->ath", alike, x))


class Masked(Block):
    """Takes a mask of [rows or 1, 1, tokens, tokens] and a position table of [1, tokens, features]."""

    def forward(self, x: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        x = x * table
        q, k, v = (
            p.view(rows, tokens, HEADS, -1).transpose(1, 2) for p in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask * self.norm.bias.sum())
        return x + self.mlp(self.out(mixed.transpose(1, 2).reshape(rows, tokens, HIDDEN)))


class Stack(nn.Module):
    """Blocks of one kind between two linear layers."""

    def __init__(self, kind: type[nn.Module], *, shared_mask: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(8, HIDDEN)
        self.layers = nn.ModuleList(kind() for _ in range(2))
        self.shared_mask = shared_mask

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        extra: tuple[Tensor, ...] = ()
        if isinstance(self.layers[0], Masked):
            rows, tokens, _ = x.shape
            mask = torch.ones(1 if self.shared_mask else rows, 1, tokens, tokens, dtype=x.dtype).tril()
            extra = (mask, torch.linspace(1, 2, tokens, dtype=x.dtype)[None, :, None].expand(1, tokens, HIDDEN))
        first_is_time = isinstance(self.layers[0], TimeFirst)
        x = x.transpose(0, 1).contiguous() if first_is_time else x
        for layer in self.layers:
            x = layer(x, *extra)
        return x


def made(kind: type[nn.Module], **how: Any) -> Stack:
    torch.manual_seed(0)
    return Stack(kind, **how).double()


def train(model: nn.Module, plain: nn.Module, shapes: list[tuple[int, int]]) -> int:
    """Steps of all ``shapes`` with the plain model's gradients and the plan's bytes; how often it was profiled."""
    for seed, (rows, tokens) in enumerate(shapes):
        inputs = signal(rows=rows, tokens=tokens, seed=seed)
        assert_close(step(model, inputs), step(plain, inputs))
        report = memo.report(model)
        for name in ("bytes_to_host", "bytes_to_device", "bytes_kept", "recomputed_flops"):
            assert getattr(report.totals, name) == getattr(report.totals.forecast, name), (rows, tokens, name)
        assert report.totals.stash_peak_bytes == report.totals.forecast.stash_peak_bytes
        assert not [note for note in report.notes if "saved other tensors" in note or "estimate" in note]
        assert_nothing_held(model)
    wrapped = find_wrapped(model)
    assert wrapped is not None
    return wrapped.profiled


UP = [(1, 24), (3, 24), (2, 24), (5, 31), (1, 31)]
DOWN = [(3, 33), (1, 33), (3, 24), (2, 47), (7, 5)]


@pytest.mark.parametrize("shapes", [UP, pytest.param(DOWN, marks=pytest.mark.slow)], ids=["up", "down"])
@pytest.mark.parametrize("policy", MAIN_POLICIES)
@pytest.mark.parametrize("kind", [Block, PositionBias, Table, TimeFirst], ids=lambda kind: kind.__name__)
def test_one_profile_serves_all_batch_sizes(kind: type[nn.Module], policy: str, shapes: list[tuple[int, int]]) -> None:
    model, plain = memo.wrap(made(kind), **POLICIES[policy]), made(kind)
    assert train(model, plain, shapes) == 1


@pytest.mark.parametrize("policy", MAIN_POLICIES)
def test_what_grows_with_the_square_of_the_batch_is_profiled_anew(policy: str) -> None:
    model, plain = memo.wrap(made(Contrast), **POLICIES[policy]), made(Contrast)
    assert train(model, plain, [(2, 24), (4, 24), (3, 24)]) == 3
    assert train(model, plain, [(4, 31), (2, 13)]) == 3


@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_argument_that_the_batch_shares(shared: bool) -> None:
    """With one sequence nobody can tell; with more the profile knows."""
    model = memo.wrap(made(Masked, shared_mask=shared), **POLICIES["memo"])
    plain = made(Masked, shared_mask=shared)
    assert train(model, plain, [(1, 24), (3, 24), (5, 31), (2, 17), (1, 24)]) <= 2
    model = memo.wrap(made(Masked, shared_mask=shared), **POLICIES["memo"])
    assert train(model, plain, [(3, 24), (5, 31), (2, 17), (1, 24)]) == 1
