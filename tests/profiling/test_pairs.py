"""Blocks with two lengths, their own and that of another stack: one profile serves all pairs, exact to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.lookup import find_wrapped
from memo_runtime.wrapping import Wrapped
from tests.api.main_ways import MAIN_POLICIES
from tests.api.subjects import assert_close, assert_nothing_held, step
from tests.api.towers import POLICIES
from tests.exactness.models import FAMILIES
from tests.sharing import shared_work
from tests.tiny import few_samples

__all__ = ["few_samples", "shared_work"]

every_policy = pytest.mark.parametrize("policy", MAIN_POLICIES)


def pair(encoder: int, decoder: int, *, rows: int = 2, padded: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(encoder * 100 + decoder)
    ids, labels = (torch.randint(3, 60, (rows, length), generator=generator) for length in (encoder, decoder))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "labels": labels} | ({"attention_mask": mask} if padded else {})


def wrapped_in(model: nn.Module) -> Wrapped:
    found = find_wrapped(model)
    assert found is not None
    return found


def train(model: nn.Module, plain: nn.Module, batches: list[Any]) -> None:
    """Steps with the plain model's gradients and the plan's bytes."""
    for number, batch in enumerate(batches):
        found = []
        for each in (model, plain):
            torch.manual_seed(number)
            found.append(step(each, batch))
        assert_close(*found)
        totals = memo.report(model).totals
        for name in ("bytes_to_host", "bytes_to_device", "bytes_kept", "recomputed_flops", "stash_peak_bytes"):
            assert getattr(totals, name) == getattr(totals.forecast, name), (number, name)
        assert not [note for note in memo.report(model).notes if "saved other tensors" in note or "estimate" in note]
        assert_nothing_held(model)


def t5(**changes: Any) -> nn.Module:
    return FAMILIES["t5"].make(**changes)


@every_policy
def test_one_profile_of_an_encoder_and_a_decoder_serves_all_pairs_of_lengths(policy: str) -> None:
    model, plain = memo.wrap(t5(), **POLICIES[policy], loss="native"), t5()
    train(model, plain, [pair(24, 17), pair(31, 17), pair(31, 20), pair(13, 29), pair(40, 40), pair(24, 17)])
    assert wrapped_in(model).profiled == 1


@pytest.mark.slow
def test_padded_pairs() -> None:
    model, plain = memo.wrap(t5(), **POLICIES["memo"], loss="native"), t5()
    train(model, plain, [pair(*lengths, padded=True) for lengths in [(24, 17), (31, 20), (50, 9)]])
    assert wrapped_in(model).profiled == 1


class Cross(nn.Module):
    """PyTorch's own encoder and decoder layers."""

    def __init__(self) -> None:
        super().__init__()
        how = {"dim_feedforward": 48, "dropout": 0.0, "batch_first": True}
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, **how) for _ in range(2))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(32, 4, **how) for _ in range(2))

    def forward(self, lengths: tuple[Tensor, Tensor]) -> Tensor:
        source, target = lengths
        for layer in self.encoder:
            source = layer(source)
        for layer in self.decoder:
            target = layer(target, source)
        return target


def crosses() -> tuple[nn.Module, nn.Module]:
    """Two that are equal."""
    torch.manual_seed(0)
    plain, model = (Cross().double() for _ in range(2))
    model.load_state_dict(plain.state_dict())
    return plain, model


def gradients(
    model: nn.Module, plain: nn.Module, source: int, target: int, rows: int = 2
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of one step of both."""
    batch = tuple(torch.randn(rows, n, 32, dtype=torch.float64) for n in (source, target))
    found = []
    for each in (model, plain):
        each.zero_grad(set_to_none=True)
        each(batch).sin().mean().backward()  # a norm is last: squares would have nearly none
        found.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    return found[0], found[1]


@every_policy
def test_decoder_layers_of_pytorch(policy: str) -> None:
    plain, model = crosses()
    memo.wrap(model, **POLICIES[policy])
    for source, target in [(24, 17), (31, 17), (19, 40), (24, 9)]:
        assert_close(*gradients(model, plain, source, target))
        totals = memo.report(model).totals
        assert totals.bytes_to_host == totals.forecast.bytes_to_host > 0
        assert totals.stash_peak_bytes == totals.forecast.stash_peak_bytes
    assert wrapped_in(model).profiled == 1


#: Of T5, whose pairs are told above, it is a slow test: four profiles of four kinds of blocks.
@pytest.mark.parametrize("lengths", [[(2, 24, 24), (2, 31, 24)], [(2, 24, 17), (3, 31, 20)]], ids=["equal", "rows"])
def test_what_a_pair_cannot_tell_is_profiled_anew(lengths: list[tuple[int, int, int]]) -> None:
    """Equal lengths do not say whose a dimension is, and a batch that changes rows as well is between two laws."""
    plain, model = crosses()
    memo.wrap(model, **POLICIES["memo"])
    for rows, source, target in lengths:
        assert_close(*gradients(model, plain, source, target, rows))
    assert wrapped_in(model).profiled == 2


@pytest.mark.slow
def test_what_a_pair_of_t5_cannot_tell_is_profiled_anew() -> None:
    """As above."""
    for batches in ([pair(24, 24), pair(31, 24)], [pair(24, 17), pair(31, 20, rows=3)]):
        model, plain = memo.wrap(t5(), **POLICIES["memo"], loss="native"), t5()
        for batch in batches:
            found = []
            for each in (model, plain):
                torch.manual_seed(3)
                found.append(step(each, batch))
            assert_close(*found)
        assert wrapped_in(model).profiled == 2
