"""Attention under spans (``blocks/spans.py``) as one operator, with its gradient.

    memo_runtime::masked_attention(query, key, value, spans, scale) -> (output, log-sum-exp)

Replay pins its results by name, a trace has it as one operator, tiles run it at full length and start its backward from
what it saved. Work is what the spans show, memory that of queries, keys and values: no score or mask of all pairs is
made. On a GPU short documents and windows go to flash attention's varlen kernel in one call, long documents and
whatever else to the kernels of plain attention, piece by piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.library import Library

from memo_runtime.blocks.operators import MASKED_ATTENTION
from memo_runtime.blocks.spans import Kind, Layout, Piece, layout_of
from memo_runtime.execution.mixers.attention import (
    Inputs,
    Kernel,
    Saved,
    Settings,
    attention_backward,
    attention_forward,
    kernels_for,
)
from memo_runtime.execution.mixers.varlen import Section, sections_of, varlen_backward, varlen_forward

_NAME = MASKED_ATTENTION.replace(".", "::")
_ARGUMENTS = "Tensor query, Tensor key, Tensor value, Tensor spans"
_LIBRARY = Library("memo_runtime", "FRAGMENT")
_LIBRARY.define(f"masked_attention({_ARGUMENTS}, float scale) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"masked_attention_backward(Tensor grad, {_ARGUMENTS}, Tensor output, Tensor lse, float scale) "
    "-> (Tensor, Tensor, Tensor)"
)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Attention of [B, H, S, D] under ``spans`` [B or 1, 1, S, 2]; heads of keys may be fewer than of queries.

    Under autocast it takes its arguments in the precision that plain attention would.
    """
    kind = query.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    factor = scale if scale is not None else query.shape[-1] ** -0.5
    output: torch.Tensor = torch.ops.memo_runtime.masked_attention(query, key, value, spans, factor)[0]
    return output


#: Dimensions of the log-sum-exp that kernels leave, as the last forward has seen it: releases of PyTorch differ.
_DIMENSIONS = {"cudnn": 4}


# ---- forward


def _empty(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp, token-major in memory, so that all rows are one run of tokens."""
    batch, heads, tokens, _ = query.shape
    output = query.new_empty((batch, tokens, heads, value.shape[-1])).transpose(1, 2)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return output, query.new_empty((batch, tokens, heads), dtype=wide).transpose(1, 2)


def _shapes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty(query, value)


def _settings(piece: Piece, scale: float) -> Settings:
    return Settings(dropout=0.0, causal=piece.kind is Kind.CAUSAL, scale=scale, grouped=True)


def _part(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The queries of ``piece``."""
    return tensor[piece.above : piece.below, :, piece.start : piece.stop]


def _inputs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: torch.Tensor, piece: Piece
) -> Inputs:
    rows, keys = slice(piece.above, piece.below), slice(piece.first, piece.end)
    mask = None
    if piece.kind is Kind.BAND:
        seen = spans[min(piece.above, len(spans) - 1), 0, piece.start : piece.stop]
        places = torch.arange(piece.first, piece.end, device=spans.device, dtype=torch.int32)
        mask = (places >= seen[:, :1]) & (places < seen[:, 1:])
    return Inputs(_part(query, piece), key[rows, :, keys], value[rows, :, keys], mask)


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = _layout(query, key, spans)
    sections = sections_of(layout, query, key, value)
    if sections is not None:
        query, key, value = (_token_major(one) for one in (query, key, value))
        if _is_all(sections, query):
            made, by_head = varlen_forward(sections[0], layout, (query, key, value), scale)
            return _in_rows(made, query), _in_rows(by_head.t().contiguous(), query)
    output, lse = _empty(query, value)
    output.zero_()
    lse.zero_()
    pieces = layout.pieces if sections is None else [one.piece for one in sections if one.piece is not None]
    for piece in pieces:
        inputs = _inputs(query, key, value, spans, piece)
        made, saved = attention_forward(inputs, _settings(piece, scale), seed=0)
        _part(output, piece).copy_(made)
        rows = _rows_of(saved, piece)
        if rows is not None:
            _part(lse, piece).copy_(rows)
    for section in sections or ():
        if section.piece is None:
            made, by_head = varlen_forward(section, layout, (query, key, value), scale)
            section.of(output).copy_(made)
            section.of(lse).copy_(by_head.t())
    return output, lse


def _layout(query: torch.Tensor, key: torch.Tensor, spans: torch.Tensor) -> Layout:
    """The layout for all rows of ``query``, which may share one row of spans."""
    layout = layout_of(spans, key.shape[2])
    if len(spans) == len(query):
        return layout
    return layout.shared_by(len(query))


def _rows_of(saved: Saved, piece: Piece) -> torch.Tensor | None:
    """Log-sum-exp [B, H, S] as a kernel has left it; None where it leaves none."""
    if saved.kernel.name == "rows":
        return None
    lse = saved.tensors[0]
    assert lse is not None, "fused kernels leave it"
    if saved.kernel.name == "cudnn":
        _DIMENSIONS["cudnn"] = lse.dim()
        return lse.reshape(lse.shape[:3])
    return lse[..., : piece.stop - piece.start]


# ---- backward


def _saved_again(kernel: str, lse: torch.Tensor, piece: Piece) -> Saved:
    """What ``kernel`` would have left; nothing was dropped, so no state of a generator is read."""
    lse, queries, keys = lse.contiguous(), piece.stop - piece.start, piece.end - piece.first
    if kernel == "flash":
        state = torch.zeros(2, dtype=torch.uint64, device=lse.device)
        unused = torch.zeros((), dtype=torch.uint64, device=lse.device)
        return Saved(Kernel(kernel), (lse, None, None, state, unused), (queries, keys))
    if kernel == "cudnn":
        seed, offset = (torch.zeros((), dtype=torch.int64, device=lse.device) for _ in range(2))
        lse = lse.unsqueeze(-1) if _DIMENSIONS["cudnn"] == 4 else lse
        return Saved(Kernel(kernel), (lse, None, None, seed, offset), (queries, keys))
    if kernel == "efficient":
        seed, offset = (torch.zeros((), dtype=torch.int64, device=lse.device) for _ in range(2))
        return Saved(Kernel(kernel), (torch.nn.functional.pad(lse, (0, -queries % 32)), seed, offset))
    return Saved(Kernel(kernel), (lse,) if kernel == "cpu" else (), (0,) if kernel == "rows" else ())


def _backward(grad: torch.Tensor, *given: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``given``: as the schema says."""
    query, key, value, spans, output, lse, scale = given
    layout = _layout(query, key, spans)
    sections = sections_of(layout, query, key, value)
    if sections is not None:
        grad, query, key, value, output = (_token_major(one) for one in (grad, query, key, value, output))
        if _is_all(sections, query):
            tensors = (grad, query, key, value, output)
            made = varlen_backward(sections[0], layout, tensors, sections[0].of(lse).t(), scale)
            return _in_rows(made[0], query), _in_rows(made[1], query), _in_rows(made[2], query)
    wide = torch.promote_types(key.dtype, torch.float32) if layout.overlaps and sections is None else key.dtype
    query_grad = _zeros(query)
    key_grad, value_grad = _zeros(key, wide), _zeros(value, wide)
    pieces = layout.pieces if sections is None else [one.piece for one in sections if one.piece is not None]
    for piece in pieces:
        inputs, settings = _inputs(query, key, value, spans, piece), _settings(piece, scale)
        saved = _saved_again(next(kernels_for(inputs, settings)), _part(lse, piece), piece)
        found = attention_backward(_part(grad, piece), inputs, _part(output, piece), saved, settings)
        rows, keys = slice(piece.above, piece.below), slice(piece.first, piece.end)
        parts = (_part(query_grad, piece), key_grad[rows, :, keys], value_grad[rows, :, keys])
        for target, found_part in zip(parts, found[:3], strict=True):
            assert found_part is not None, "queries, keys and values have gradients"
            target.add_(found_part)
    for section in sections or ():
        if section.piece is None:
            tensors = (grad, query, key, value, output)
            made = varlen_backward(section, layout, tensors, section.of(lse).t(), scale)
            for whole, part in zip((query_grad, key_grad, value_grad), made, strict=True):
                section.of(whole).copy_(part)
    return query_grad, key_grad.to(key.dtype), value_grad.to(value.dtype)


def _is_all(sections: Sequence[Section], query: torch.Tensor) -> bool:
    """One call of the varlen kernel makes everything, so that what it yields need not be copied."""
    whole = (0, len(query) * query.shape[2])
    return len(sections) == 1 and sections[0].piece is None and (sections[0].start, sections[0].stop) == whole


def _token_major(tensor: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] over memory laid out [B, S, H, D]; mostly it is."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _in_rows(tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """[B * S, H, ...] as [B, H, S, ...]."""
    found: torch.Tensor = tensor.unflatten(0, (len(query), query.shape[2])).transpose(1, 2)
    return found


def _zeros(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Token-major, so that all rows are one run of tokens."""
    batch, heads, tokens, depth = like.shape
    return like.new_zeros((batch, tokens, heads, depth), dtype=dtype or like.dtype).transpose(1, 2)


def _backward_shapes(grad: torch.Tensor, *given: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = (torch.empty_like(one) for one in given[:3])
    return query, key, value


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: torch.Tensor | None, unused: torch.Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 5
    backward = torch.ops.memo_runtime.masked_attention_backward
    return (*backward(grad, *ctx.saved_tensors, ctx.scale), None, None)


_LIBRARY.impl("masked_attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("masked_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _shapes, lib=_LIBRARY)
torch.library.register_fake(f"{_NAME}_backward", _backward_shapes, lib=_LIBRARY)
torch.library.register_autograd(_NAME, _gradients, setup_context=_keep, lib=_LIBRARY)
