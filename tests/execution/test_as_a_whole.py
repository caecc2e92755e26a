"""Blocks that are run again as a whole keep budgets too: storages are counted, small ones are sent with the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.blocks.grouping import Member
from memo_runtime.blocks.parcels import parcels_of
from memo_runtime.sizes import HOST_ALIGNMENT, MIN_SWAP_BYTES
from tests.exactness.compare import (
    MAIN_WAYS,
    Step,
    Way,
    assert_acted,
    assert_clean,
    assert_gradients,
    assert_same,
    assert_trade,
    output_loss,
    run_step,
)
from tests.exactness.models import text


def swin() -> nn.Module:
    """Windows divide the image, so that no crop of it runs."""
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4, drop_path_rate=0.2
    )
    return transformers.SwinModel(config)


def rwkv() -> nn.Module:
    """A loop over tokens, which saves hundreds of tensors of a few hundred bytes and drops the last of its states."""
    config = transformers.RwkvConfig(
        vocab_size=97, context_length=64, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16
    )
    return transformers.RwkvForCausalLM(config)


def picture(tokens: int = 0) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)}


def sentence(tokens: int = 17) -> dict[str, Tensor]:
    return {"input_ids": text(rows=2, tokens=tokens)["input_ids"]}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., dict[str, Tensor]]]] = {
    "swin": (swin, picture),
    "rwkv": (rwkv, sentence),
}


def trained(name: str) -> nn.Module:
    torch.manual_seed(2)
    return MODELS[name][0]().double().train()


@pytest.fixture(scope="module", params=MODELS)
def subject(request: pytest.FixtureRequest) -> tuple[str, Any, Step]:
    """Name, profile, and one step of it unwrapped."""
    model, batch = trained(request.param), MODELS[request.param][1]()
    return request.param, memo.profile(model, batch), run_step(model, batch, output_loss)


def planned(name: str, profile: Any, **settings: Any) -> nn.Module:
    """The model with a plan from ``profile``."""
    return memo.wrap(trained(name), plan=memo.plan(profile, **settings), loss="native")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_no_budget_is_exceeded_and_the_forecast_is_the_peak(subject: tuple[str, Any, Step], share: float) -> None:
    name, profile, want = subject
    most = memo.plan(profile, policy="swap", keep_last=0).forecast.peak_bytes
    least = memo.plan(profile, policy="auto").floor_bytes
    budget = int(least + (most - least) * share)
    model, batch = planned(name, profile, policy="auto", budget=budget), MODELS[name][1]()
    for _ in range(2):
        assert_gradients(run_step(model, batch, output_loss).gradients, want.gradients, Way("auto"))
    totals = memo.report(model).totals
    assert totals.peak_bytes == totals.forecast.peak_bytes <= budget
    assert totals.host_bytes == totals.forecast.host_bytes
    assert not any("more than the limit" in note for note in memo.report(model).notes)
    assert_trade(model)
    assert_clean(model)


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
def test_gradients_trade_and_peak(subject: tuple[str, Any, Step], way: Way) -> None:
    name, profile, want = subject
    model, batch = planned(name, profile, policy=way.policy, alpha=way.alpha, keep_last=0), MODELS[name][1]()
    for _ in range(2):
        assert_same(run_step(model, batch, output_loss), want, way)
    assert_acted(model, way, fallback="slice" if name == "swin" else "mixes tokens")
    assert_trade(model)
    assert_clean(model)
    totals = memo.report(model).totals
    assert totals.peak_bytes == totals.forecast.peak_bytes
    assert totals.bytes_kept == 0


@pytest.mark.parametrize("policy", ["swap", "recompute"])
@pytest.mark.parametrize("subject", ["rwkv"], indirect=True)
def test_what_does_not_grow_is_told_from_what_does(subject: tuple[str, Any, Step], policy: str) -> None:
    """At another length than the profiled one only what is aligned is not a line."""
    name, profile, _ = subject
    model = planned(name, profile, policy=policy, keep_last=0, seq_len=34)
    run_step(model, sentence(34), output_loss)
    totals = memo.report(model).totals
    slack = 16 * HOST_ALIGNMENT
    assert abs(totals.peak_bytes - totals.forecast.peak_bytes) < slack < totals.stash_peak_bytes // 50
    assert abs(totals.bytes_to_host - totals.forecast.bytes_to_host) < slack


def test_small_ones_share_a_parcel_by_dtype_and_come_back() -> None:
    base = torch.arange(400, dtype=torch.float64)
    small = [torch.arange(n, dtype=torch.float64) for n in (1, 5, 8)]
    complex_one = torch.complex(small[1], small[1] + 1).conj()
    members = [Member(tensor, None, i) for i, tensor in enumerate([*small, base[:200], base[200:], complex_one])]
    kept_apart = torch.arange(3, dtype=torch.float64)
    members += [Member(kept_apart, None, 6), Member(torch.arange(2, dtype=torch.float64), None)]
    found = parcels_of(members, whole=kept_apart.untyped_storage()._cdata)
    sizes = sorted(parcel.size_bytes for parcel in found.parcels)
    # base, kept_apart as it is, 1 + 5 + 8 numbers at multiples of 64 bytes, the complex ones, and one nobody saved.
    assert sizes == sorted([3200, 24, 64 + 64 + 64, 128, 64])
    assert found.gathered == 192 + 128 + 64
    for parcel in found.parcels:
        for view, member in zip(parcel.region.views, parcel.members, strict=True):
            got = view.of(parcel.flat.resolve_conj())
            assert torch.equal(got, member.tensor)
            small_one = parcel.size_bytes < MIN_SWAP_BYTES and member.index != 6
            assert not small_one or (view.offset * got.element_size()) % HOST_ALIGNMENT == 0


class Growing(nn.Module):
    """Saves more with every call, which no profile of its first knows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor, rounds: int) -> Tensor:
        for _ in range(rounds):
            x = torch.tanh(self.up(x))
        return x


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Growing() for _ in range(3))
        self.rounds = 1

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.rounds)
        return x.square().mean()


def test_a_broken_limit_is_said_once_and_stays_in_the_report(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = Stack().double(), torch.randn(2, 32, 16, dtype=torch.float64)
    needs = memo.plan(memo.profile(model, x), policy="swap", keep_last=0).forecast.peak_bytes
    memo.wrap(model, policy="swap", keep_last=0, budget=needs)
    model(x).backward()
    assert memo.report(model).totals.peak_bytes == needs
    model.rounds = 6
    with caplog.at_level(logging.WARNING, "memo_runtime"):
        for _ in range(2):
            model(x).backward()
    said = [record.message for record in caplog.records if "more than the limit of its plan" in record.message]
    assert len(said) == 1
    assert said[0] in memo.report(model).notes
    assert memo.report(model).totals.peak_bytes > needs
