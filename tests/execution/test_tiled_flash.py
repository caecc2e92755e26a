"""flash-attn's Functions by tiles, with a look-alike of the library: same names, same arguments, in float64 on CPU."""

from __future__ import annotations

import inspect
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from memo_runtime.blocks.call import BlockCall
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_profile import tiled_profile
from tests.exactness.hand_written import HEADS, WIDTH, Part
from tests.execution.tiles import assert_exact, call_of

RAN = {"forward": 0}


@torch.library.custom_op("memo_tests_flash::_flash_attn_forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    RAN["forward"] += 1
    k, v = (one.repeat_interleave(q.shape[-2] // one.shape[-2], -2) for one in (k, v))
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    return torch.einsum("...hqk,...khd->...qhd", (scores - lse[..., None]).exp(), v), lse


@_forward.register_fake
def _shapes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3])


def _backward(grad: Tensor, saved: tuple[Tensor, ...], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """From the log-sum-exp, as flash attention does."""
    q, k, v, out, lse, mask = saved
    groups = q.shape[-2] // k.shape[-2]
    wide_k, wide_v = (one.repeat_interleave(groups, -2) for one in (k, v))
    scores = (torch.einsum("...qhd,...khd->...hqk", q, wide_k) * scale).masked_fill(~mask, float("-inf"))
    weights = (scores - lse[..., None]).exp()
    delta = (grad * out).sum(-1).transpose(-1, -2)
    inner = weights * (torch.einsum("...qhd,...khd->...hqk", grad, wide_v) - delta[..., None]) * scale
    dk, dv = (torch.einsum("...hqk,...qhd->...khd", a, b) for a, b in ((inner, q), (weights, grad)))
    dk, dv = (one.unflatten(-2, (-1, groups)).sum(-2) for one in (dk, dv))
    return torch.einsum("...hqk,...khd->...qhd", inner, wide_k), dk, dv


#: Arguments of flash-attn 2.8.
NAMES = (
    "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_softmax"
    " is_grad_enabled"
)
VARLEN_NAMES = (
    "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size softcap"
    " alibi_slopes deterministic return_softmax block_table is_grad_enabled"
)


def _attend(ctx: Any, named: dict[str, Any], mask: Tensor) -> Tensor:
    q, k, v = (named[name] for name in "qkv")
    ctx.scale = named["softmax_scale"] or q.shape[-1] ** -0.5
    out, lse = _forward(q, k, v, mask, ctx.scale)
    ctx.save_for_backward(q, k, v, out, lse, mask)
    return out


def _signature(names: str) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(name, kind) for name in ("ctx", *names.split())])


class FlashAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        named = dict(zip(NAMES.split(), given, strict=True))
        places = torch.arange(given[0].shape[1])
        mask = places[:, None] >= places
        if named["window_size"][0] >= 0:
            mask = mask & (places[:, None] - places <= named["window_size"][0])
        return _attend(ctx, named, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *_backward(grad, ctx.saved_tensors, ctx.scale), *(None,) * 9


class FlashAttnVarlenFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        named = dict(zip(VARLEN_NAMES.split(), given, strict=True))
        places = torch.arange(given[0].shape[0])
        document = torch.searchsorted(named["cu_seqlens_q"], places, right=True)
        return _attend(ctx, named, (places[:, None] >= places) & (document[:, None] == document))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *_backward(grad, ctx.saved_tensors, ctx.scale), *(None,) * 14


FlashAttnFunc.forward.__signature__ = _signature(NAMES)
FlashAttnVarlenFunc.forward.__signature__ = _signature(VARLEN_NAMES)


@pytest.fixture(autouse=True)
def library(monkeypatch):
    module = types.ModuleType("flash_attn.flash_attn_interface")
    module.FlashAttnFunc, module.FlashAttnVarlenFunc = FlashAttnFunc, FlashAttnVarlenFunc
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)


class Flash(Part):
    """Grouped heads as flash-attn takes them: tokens before heads."""

    def __init__(self, *, dropout: float = 0.0, window: int = -1, softmax: bool = False) -> None:
        super().__init__()
        self.settings = (dropout, None, True, (window, -1), 0.0, None, False, softmax, True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in self.project(self.norm(x)).chunk(3, dim=-1))
        mixed = FlashAttnFunc.apply(q, k[..., ::2, :], v[..., ::2, :], *self.settings)
        return self.finish(x, (mixed[0] if isinstance(mixed, tuple) else mixed).flatten(-2))


class Packed(Part):
    """Documents behind each other in one row."""

    def forward(self, x: Tensor, ends: Tensor, longest: int) -> Tensor:
        q, k, v = (part[0].unflatten(-1, (HEADS, -1)) for part in self.project(self.norm(x)).chunk(3, dim=-1))
        rest = (0.0, None, True, (-1, -1), 0.0, None, False, False, None, True)
        return self.finish(x, FlashAttnVarlenFunc.apply(q, k, v, ends, ends, longest, longest, *rest).flatten(-2)[None])


def double(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(**options).double().train()


def hidden(rows: int = 3) -> Tensor:
    return torch.randn(rows, 29, WIDTH, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("window", [-1, 5])
def test_flash_attention(window):
    block = double(Flash, window=window)
    tiled = TiledBlock(block, tile=8, alpha=0.5)
    assert_exact(call_of(block, hidden()), tiled)
    assert tiled.kernels == ["flash_attn.FlashAttnFunc"]


def test_packed_documents():
    block = double(Packed)
    ends = torch.tensor([0, 7, 19, 29], dtype=torch.int32)
    assert_exact(call_of(block, hidden(1), ends, 12), TiledBlock(block, tile=8))


@pytest.mark.anew
def test_a_library_with_other_arguments_is_refused(monkeypatch):
    monkeypatch.setattr(FlashAttnFunc.forward, "__signature__", _signature("q k v settings"))
    with pytest.raises(CaptureRefusedError, match="its arguments are not those of flash-attn 2"):
        TiledBlock(double(Flash), tile=8)(hidden())
    assert "apply" not in vars(FlashAttnFunc)  # as it was


def test_its_forward_runs_once_and_its_log_sum_exp_is_stashed():
    block, x = double(Flash), hidden()
    tiled, call = TiledBlock(block, tile=8), BlockCall.of((x,), {})
    profile = tiled_profile(tiled.captured(call), call)
    assert [growth.linear for growth in profile.stash] == [3 * WIDTH * 8, 3 * WIDTH * 8, 3 * HEADS * 8]  # x, o, lse
    RAN["forward"] = 0
    tiled(x).sum().backward()
    assert RAN["forward"] == 1
    assert "apply" not in vars(FlashAttnFunc)  # as it was


@pytest.mark.parametrize(
    ("options", "reason"), [({"dropout": 0.1}, "what it drops"), ({"softmax": True}, "attention weights")]
)
def test_refused_by_name(options, reason):
    with pytest.raises(CaptureRefusedError, match=reason) as caught:
        TiledBlock(double(Flash, **options), tile=8)(hidden())
    assert caught.value.operator == "flash_attn.FlashAttnFunc"
    assert "apply" not in vars(FlashAttnFunc)
