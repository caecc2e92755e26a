"""Operators that nobody listed, in half precision: mixing that is smaller than a block's rounding is still seen."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.lookup import find_wrapped
from memo_runtime.records import PinKind
from tests.tiny import few_samples

__all__ = ["few_samples"]

WIDTH = 64


def _shift(x: Tensor, weight: float) -> Tensor:
    return x + weight * functional.pad(x, (0, 0, 1, 0))[:, :-1]


def _unshift(gradient: Tensor, weight: float) -> Tensor:
    return gradient + weight * functional.pad(gradient, (0, 0, 0, 1))[:, 1:]


@torch.library.custom_op("memo_alone::leak", mutates_args=())
def leak(x: Tensor, weight: float) -> Tensor:
    """Adds a little of the token before."""
    return _shift(x, weight)


@torch.library.custom_op("memo_alone::leak_by", mutates_args=())
def leak_by(x: Tensor, weight: Tensor) -> Tensor:
    """The same, by a weight that no shape shows."""
    return _shift(x, float(weight))


@torch.library.custom_op("memo_alone::half_leak", mutates_args=())
def half_leak(x: Tensor, weight: float) -> Tensor:
    """The same, in bfloat16 alone."""
    if x.dtype != torch.bfloat16:
        raise RuntimeError("half_leak has a kernel for bfloat16 and no other")
    return _shift(x, weight)


@torch.library.custom_op("memo_alone::half_scale", mutates_args=())
def half_scale(x: Tensor, weight: float) -> Tensor:
    """Token-wise, in bfloat16 alone."""
    if x.dtype != torch.bfloat16:
        raise RuntimeError("half_scale has a kernel for bfloat16 and no other")
    return x * weight


@torch.library.custom_op("memo_alone::leak_", mutates_args=("x",))
def leak_(x: Tensor, weight: float) -> None:
    """Writes to what it is given."""
    x.copy_(_shift(x, weight))


@torch.library.custom_op("memo_alone::turn", mutates_args=())
def turn(x: Tensor, weight: float) -> Tensor:
    """Tokens in the other direction."""
    return x.flip(1) * weight


turn.register_autograd(
    lambda ctx, gradient: (gradient.flip(1) * ctx.weight, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "weight", inputs[1]),
)
for _operator in (leak, half_leak):
    _operator.register_autograd(
        lambda ctx, gradient: (_unshift(gradient, ctx.weight), None),
        setup_context=lambda ctx, inputs, output: setattr(ctx, "weight", inputs[1]),
    )
leak_by.register_autograd(
    lambda ctx, gradient: (_unshift(gradient, ctx.weight), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "weight", float(inputs[1])),
)
half_scale.register_autograd(
    lambda ctx, gradient: (gradient * ctx.weight, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "weight", inputs[1]),
)


class Block(nn.Module):
    def __init__(self, operator: str) -> None:
        super().__init__()
        self.first, self.second, self.operator = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), operator

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.operator == "leak_":
            with torch.no_grad():
                leak_(hidden, 0.005)
        else:
            weight = 1.1 if self.operator == "half_scale" else 0.005
            hidden = getattr(torch.ops.memo_alone, self.operator)(hidden, weight)
        return x + self.second(functional.gelu(hidden))


class Tower(nn.Module):
    def __init__(self, operator: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(operator) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.float().square().mean()


def tower(operator: str) -> Tower:
    torch.manual_seed(0)
    return Tower(operator).bfloat16()


def pinned(model: nn.Module) -> dict[str, PinKind]:
    wrapped = find_wrapped(model)
    assert wrapped is not None
    assert wrapped.session.plan is not None
    return {pin.op: pin.kind for block in wrapped.session.plan.profile.blocks for pin in block.pins}


def sequence() -> Tensor:
    return torch.randn(2, 300, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()


@pytest.mark.parametrize("operator", ["leak", "half_leak"])
def test_mixing_of_half_a_percent_is_pinned(operator, caplog):
    plain = tower(operator)
    model = memo.wrap(copy.deepcopy(plain), policy="memo", alpha=0.37, keep_last=0)
    with caplog.at_level(logging.INFO, logger="memo_runtime"):
        for each in (plain, model):
            each(sequence()).backward()
    assert pinned(model) == {f"memo_alone.{operator}.default": PinKind.MIXER}
    assert ("half_leak" in caplog.text) == (operator == "half_leak")
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        gap = torch.linalg.vector_norm(p.grad.float() - q.grad.float())
        assert gap <= 5e-3 * torch.linalg.vector_norm(p.grad.float())


def test_an_operator_of_one_precision_that_is_token_wise_is_not_pinned():
    model = memo.wrap(tower("half_scale"), policy="memo", alpha=0.37, keep_last=0)
    model(sequence()).backward()
    assert pinned(model) == {}
    assert all(block.recomputed_flops > 0 for block in memo.report(model).blocks)


def test_mixing_in_place_is_why_a_block_is_not_sliced():
    model = memo.wrap(tower("leak_"), policy="memo", alpha=0.37, keep_last=0)
    model(sequence()).backward()
    assert all("memo_alone.leak_" in block.reason for block in memo.report(model).blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_of_a_transformer_layer_is_taken_for_a_mixer_but_attention(dtype):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
    model = nn.Sequential(*(copy.deepcopy(layer) for _ in range(2))).to(dtype)
    memo.wrap(model, policy="memo", alpha=0.37, keep_last=0)
    model(sequence().to(dtype).detach()).float().square().mean().backward()
    assert all("scaled_dot_product" in name for name in pinned(model))


class Learned(Block):
    def __init__(self, weight: float) -> None:
        super().__init__("leak_by")
        self.register_buffer("weight", torch.tensor(weight))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(functional.gelu(torch.ops.memo_alone.leak_by(self.first(x), self.weight)))


def test_an_operator_that_begins_as_the_identity_in_one_block_is_asked_again_in_the_next():
    """What is known of an equal block's operators is not taken over where values decide."""
    torch.manual_seed(0)
    model = tower("leak")
    model.layers = nn.ModuleList([Learned(0.0), Learned(0.005), Learned(0.0)]).bfloat16()
    found = [block.pins for block in memo.profile(model, (sequence(),)).blocks]
    assert [len(pins) for pins in found] == [0, 1, 0]


class Domains(Block):
    """Token-wise by operators that take numbers of some kind only, on what is the same for all tokens."""

    def __init__(self) -> None:
        super().__init__("")

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).square() + 1.5
        hidden = hidden.log() + hidden.sqrt() + hidden.acosh() + (1 / hidden).atanh() + (1 / hidden).acos()
        hidden = hidden + hidden.pow(0.3) + torch.special.logit(hidden / 50, eps=1e-3) + hidden.rsqrt().erfinv()
        return x + self.second(hidden.clamp(0.1, 3.0).cumsum(-1).floor() + hidden.sort(-1).values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_operators_of_some_numbers_are_token_wise_where_all_tokens_are_the_same(dtype):
    torch.manual_seed(0)
    model = tower("leak")
    model.layers = nn.ModuleList(Domains() for _ in range(2))
    memo.wrap(model.to(dtype), policy="memo", alpha=0.37, keep_last=0)
    model(torch.full((2, 300, WIDTH), 0.5, dtype=dtype)).backward()
    assert {name for name in pinned(model) if "cumsum" not in name} == set()
    assert all(block.recomputed_flops > 0 for block in memo.report(model).blocks)


def test_an_operator_of_a_library_is_asked_on_other_tokens_where_all_are_the_same():
    model = memo.wrap(tower("turn").double(), policy="memo", alpha=0.37, keep_last=0)
    model(torch.zeros(2, 300, WIDTH, dtype=torch.float64)).backward()
    assert pinned(model) == {"memo_alone.turn.default": PinKind.MIXER}
