"""Operators that are made of others, and some that have a rule: by tiles they are what they are in the block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from memo_runtime.blocks import operators
from memo_runtime.capture.composites import composites
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution.tiled import TiledBlock
from tests.execution.tiles import assert_exact, call_of

WIDTH = 16


class Around(nn.Module):
    """``operators`` one after another between two products; each also gets a vector and the weight of the first."""

    def __init__(self, *operators: Callable[..., Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.vector = nn.Parameter(torch.rand(WIDTH))
        self.operators = operators

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        for operator in self.operators:
            hidden = operator(hidden, self.vector, self.up.weight)
        return x + self.down(hidden)


OPERATORS: dict[str, Callable[..., Any]] = {
    "movedim": lambda h, v, w: h.movedim(1, 2).movedim(2, 1),
    "moveaxis": lambda h, v, w: h.moveaxis(0, 1).moveaxis(1, 0),
    "swapdims": lambda h, v, w: h.swapdims(1, 2).swapdims(1, 2),
    "narrow": lambda h, v, w: torch.cat([h.narrow(-1, 8, 8), h.narrow(-1, 0, 8)], -1),
    "view_as": lambda h, v, w: h.view(*h.shape[:2], 4, 4).view_as(h) * v,
    "reshape_as": lambda h, v, w: h.reshape(*h.shape[:2], 4, 4).reshape_as(h) * v,
    "concatenate": lambda h, v, w: torch.concatenate([h[..., 8:], h[..., :8]], -1),
    "dstack": lambda h, v, w: torch.dstack(h.dsplit(2)[::-1]),
    "vstack": lambda h, v, w: torch.vstack(h.vsplit(2)[::-1]),
    "polar": lambda h, v, w: torch.view_as_real(torch.polar(h[..., :8].exp(), h[..., 8:])).flatten(-2),
    "tile": lambda h, v, w: torch.tile(h[..., :8], (1, 1, 2)),
    "diff": lambda h, v, w: torch.cat([h[..., :1], h.diff(dim=-1)], -1),
    "pairwise_distance": lambda h, v, w: h * functional.pairwise_distance(h, h.sin() + v)[..., None],
    "trapezoid": lambda h, v, w: h * torch.trapezoid(h, dim=-1)[..., None],
    "broadcast_tensors": lambda h, v, w: torch.mul(*torch.broadcast_tensors(h, v)),
    "atleast_3d": lambda h, v, w: torch.atleast_3d(h) * torch.atleast_1d(v),
    "group_norm": lambda h, v, w: functional.group_norm(h.flatten(0, 1), 4, v).view_as(h),
    "cumprod": lambda h, v, w: (1 + 0.1 * h).cumprod(-1),
    "logcumsumexp": lambda h, v, w: h.logcumsumexp(-1),
    "nansum": lambda h, v, w: h * h.nansum(-1, keepdim=True),
    "hardswish": lambda h, v, w: functional.hardswish(h),
    "log_sigmoid": lambda h, v, w: functional.logsigmoid(h),
    "i0": lambda h, v, w: torch.special.i0(h),
}


@pytest.mark.parametrize("first", range(4))
def test_they_are_exact_by_tiles(first: int) -> None:
    """Every fourth of them in one block."""
    torch.manual_seed(0)
    block = Around(*list(OPERATORS.values())[first::4]).double()
    x = torch.randn(2, 21, WIDTH, dtype=torch.float64, requires_grad=True)
    assert_exact(call_of(block, x), TiledBlock(block, tile=8, alpha=0.5))


MIXING: dict[str, tuple[Callable[..., Any], str]] = {
    "tokens moved": (lambda h, v, w: h.movedim(1, 0), "cannot be traced"),
    "part of the tokens": (lambda h, v, w: h.narrow(1, 0, 8).repeat(1, 3, 1)[:, : h.shape[1]], "part of the tokens"),
    "tokens joined": (lambda h, v, w: torch.hstack([h, h])[:, : h.shape[1]], "along the token dimension"),
    "tokens split": (lambda h, v, w: torch.cat(h.hsplit([8])[::-1], 1), "along the token dimension"),
    "along tokens": (lambda h, v, w: h.cumprod(1), "along the token dimension"),
    "difference of tokens": (lambda h, v, w: functional.pad(h.diff(dim=1), (0, 0, 1, 0)), "part of the tokens"),
    "norm over tokens": (lambda h, v, w: functional.group_norm(h.mT, 4).mT, "over the tokens of a sequence"),
    "area over tokens": (lambda h, v, w: h * torch.trapezoid(h, dim=1)[:, None], "takes single tokens"),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_tokens_is_refused(name: str) -> None:
    torch.manual_seed(0)
    operator, why = MIXING[name]
    block = Around(operator).double()
    with pytest.raises(CaptureRefusedError, match=why):
        TiledBlock(block, tile=8)(torch.randn(21, 21, WIDTH, dtype=torch.float64))


def test_what_is_named_a_mixer_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {torch.ops.aten.movedim.int, torch.ops.aten.diff.default} <= set(composites())
    monkeypatch.setattr(operators, "_registered_mixers", {"aten.diff"})
    assert torch.ops.aten.diff.default not in composites()


@pytest.mark.parametrize("operator", [
    lambda h, v, w: h * functional.cosine_similarity(h, h.sin() + v, dim=-1)[..., None],
    lambda h, v, w: torch.tensordot(h, w, dims=1),
], ids=["cosine_similarity", "tensordot"])  # fmt: skip
def test_what_autocast_has_by_name_is_not_taken_apart(operator: Callable[..., Any]) -> None:
    with pytest.raises(CaptureRefusedError, match="is not known to treat tokens one by one"):
        TiledBlock(Around(operator), tile=8)(torch.randn(2, 21, WIDTH))


def test_under_autocast_parts_are_cast_as_in_the_block() -> None:
    """A norm inside is in float32 there, and what moves dimensions is in whatever it is given."""
    torch.manual_seed(0)
    block = Around(OPERATORS["pairwise_distance"], OPERATORS["movedim"], OPERATORS["tile"])
    x = torch.randn(2, 21, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(TiledBlock(block, tile=32)(x), block(x))
