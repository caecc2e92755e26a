"""Models that newcomers bring: other lengths inside, padded convolutions, sparse tensors, transforms of torch.func."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.errors import BlockFallbackError
from memo_runtime.records import Executor
from tests.api.towers import HIDDEN, Block, tower
from tests.tiny import few_samples

__all__ = ["few_samples"]


class Padded(nn.Module):
    """A causal convolution: its input is padded by three tokens, in front by hand or on both sides by itself."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 4, groups=HIDDEN, padding=0 if by_hand else 3)
        self.mlp = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.transpose(1, 2)
        mixed = self.conv(functional.pad(channels, (3, 0)) if self.by_hand else channels)[..., : x.shape[1]]
        return x + self.mlp(functional.silu(mixed).transpose(1, 2))


class ToMultiple(nn.Module):
    """Pads its tokens to a multiple, as scans by chunks do."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        padded = functional.pad(x, (0, 0, 0, -x.shape[1] % 64))
        return x + self.mlp(torch.tanh(functional.silu(padded))[:, : x.shape[1]])


class Mapped(Block):
    """Maps over its rows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * torch.vmap(torch.sin)(x)


class Graph(Block):
    """Neighbours by a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", torch.eye(24, dtype=torch.float64).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.stack([torch.sparse.mm(self.edges, row) for row in x])


class Inner(Block):
    """Calls a transform that takes no saved-tensor hooks."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.01 * torch.func.grad(lambda t: self.mlp(t).square().sum())(x)


class Cutting(nn.Module):
    """Cuts its batch itself, as masked autoencoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.length = tower(), 40

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x[:, : self.length])


def made_of(make: Any) -> nn.Module:
    model = tower()
    model.layers = nn.ModuleList(make() for _ in range(3))
    return model.double()


def signal(tokens: int = 24) -> Tensor:
    return torch.randn(2, tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("policy", ["swap", "recompute", "memo"])
def test_what_a_convolution_pads_is_forecast_to_the_byte_at_every_length(policy: str, by_hand: bool) -> None:
    model = made_of(lambda: Padded(by_hand))
    memo.wrap(model, policy=policy, alpha=0.5 if policy == "memo" else None, keep_last=0)
    for tokens in (1000, 517):
        step(model, signal(tokens))
        totals = memo.report(model).totals
        assert totals.bytes_to_host == totals.forecast.bytes_to_host > 0
        assert totals.peak_bytes == totals.forecast.peak_bytes
        assert totals.bytes_kept == totals.forecast.bytes_kept


@pytest.mark.parametrize("first", [100, 300, 1000])
def test_what_is_padded_to_a_multiple_is_never_forecast_below_nothing(first: int) -> None:
    model = made_of(ToMultiple)
    profile = memo.profile(model, (signal(first),))
    for block in profile.blocks:
        for tokens in (1, 64, 300, 4096, 65536):
            assert all(group.size.at(tokens) >= 0 for group in block.groups)
    kept = [memo.plan(profile, policy="none", seq_len=tokens).forecast.bytes_kept for tokens in (1024, 4096, 16384)]
    assert kept[1] == pytest.approx(4 * kept[0], rel=0.1)
    assert kept[2] == pytest.approx(16 * kept[0], rel=0.1)


@pytest.mark.parametrize("settings", [{"policy": "tiled", "tile": 8}, {"policy": "recompute", "keep_last": 0}])
@pytest.mark.parametrize("make", [Mapped, Graph])
def test_what_cannot_be_seen_trains_and_says_why(make: type[nn.Module], settings: dict[str, Any]) -> None:
    plain = made_of(make)
    model = copy.deepcopy(plain)
    memo.wrap(model, **settings)
    for _ in range(2):
        pairs = zip(step(model, signal()), step(plain, signal()), strict=True)
        assert all(torch.allclose(got, want, rtol=1e-11, atol=1e-14) for got, want in pairs)
    blocks = memo.report(model).blocks
    assert {block.executor for block in blocks} <= {Executor.REPLAY, Executor.NATIVE}
    if "tile" in settings:
        assert all(block.reason for block in blocks)
    elif make is Graph:
        assert all(block.bytes_to_host > 0 for block in blocks)


@pytest.mark.parametrize("settings", [{"budget": "1GiB"}, {"policy": "swap"}, {}])
def test_unknown_blocks_are_not_called_kept(settings: dict[str, Any]) -> None:
    model = made_of(Inner)
    memo.wrap(model, **settings)
    step(model, signal())
    report = memo.report(model)
    assert {block.executor for block in report.blocks} == {Executor.NATIVE}
    assert all("saved tensor hooks" in block.reason for block in report.blocks)
    memo.unwrap(model)
    memo.wrap(model, strict=True, **settings)
    with pytest.raises(BlockFallbackError, match="3 of 3 blocks"):
        step(model, signal())


def test_a_length_that_the_model_does_not_show_is_said_and_counted() -> None:
    model = Cutting()
    memo.wrap(model, budget="1GiB")
    step(model, signal(160))
    kept = memo.report(model).totals.bytes_kept
    assert not any("tokens where its plan" in note for note in memo.report(model).notes)
    model.length = 160
    step(model, signal(160))
    report = memo.report(model)
    (said,) = [note for note in report.notes if "was given 160 tokens where its plan is for 40" in note]
    assert "Would work" in said
    assert report.totals.bytes_kept == 4 * kept


class _Reversible(torch.autograd.Function):
    """All blocks without gradients; backward runs them again, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: nn.ModuleList, *parameters: Tensor) -> Tensor:
        ctx.layers, ctx.parameters = layers, parameters
        ctx.save_for_backward(x)
        for layer in layers:
            x = layer(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            y = start = x.detach().requires_grad_()
            for layer in ctx.layers:
                y = type(layer).forward(layer, y)
        found = torch.autograd.grad(y, [start, *ctx.parameters], grads)
        return found[0], None, *found[1:]


class ByItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = tower().layers
        self.last = nn.Linear(HIDDEN, 8, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.cat([x] * 4, dim=-1)
        return self.last(_Reversible.apply(hidden, self.layers, *self.layers.parameters()))


def test_a_step_in_which_every_block_runs_without_gradients_is_said() -> None:
    model = memo.wrap(ByItself(), policy="swap")
    plain = copy.deepcopy(model)
    for one in (model, plain):
        step(one, signal())
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert [note for note in memo.report(model).notes if "nothing was managed in a step" in note] != []


def test_evaluation_is_no_step_in_which_nothing_is_managed() -> None:
    model = memo.wrap(tower(), policy="swap")
    with torch.no_grad():
        model(signal())
    with pytest.raises(RuntimeError):
        model(signal()[..., :3])  # fails before a block
    with torch.no_grad():
        model(signal())
    step(model, signal())
    assert not any("nothing was managed" in note for note in memo.report(model).notes)
