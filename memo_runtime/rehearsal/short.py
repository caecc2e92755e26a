"""Arguments of a kernel of attention, shortened: tensors of the same memory order, with fewer tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from memo_runtime.rehearsal.kernels import MASKS, Named
from memo_runtime.rehearsal.laws import Layout

_TOKENS = 2  # [B, H, S, D]


def cut(length: int, tokens: int, whole: int) -> int:
    """``length`` where ``whole`` becomes ``tokens``."""
    return max(1, -(-length * tokens // whole))


def short_layout(layout: Layout, tokens: int, whole: int) -> Layout:
    """``layout`` [B, H, S, D] with its S cut: strides over tokens shrink, gaps between heads or rows stay."""
    shape, stride = layout
    length = shape[_TOKENS]
    fewer = cut(length, tokens, whole)
    over = [step > stride[_TOKENS] and step % length == 0 for step in stride]
    return (
        (*shape[:_TOKENS], fewer, *shape[_TOKENS + 1 :]),
        tuple(step // length * fewer if above else step for step, above in zip(stride, over, strict=True)),
    )


def zeros(layout: Layout, like: torch.Tensor) -> torch.Tensor:
    """Zeros of ``layout``: finite, and no generator is asked for them."""
    return torch.empty_strided(*layout, dtype=like.dtype, device=like.device).zero_()


def shortened(named: Mapping[str, Any], tokens: int, whole: int) -> Named:
    """``named`` with fewer tokens: queries, keys and values anew, of a mask a part."""
    short = dict(named)
    for name in ("query", "key", "value"):
        one = named[name]
        short[name] = zeros(short_layout((tuple(one.shape), one.stride()), tokens, whole), one)
    queries, keys = short["query"].shape[_TOKENS], short["key"].shape[_TOKENS]
    for name in MASKS:
        mask = named.get(name)
        if isinstance(mask, torch.Tensor):
            short[name] = mask[..., : queries if mask.shape[-2] > 1 else 1, : keys if mask.shape[-1] > 1 else 1]
    return short
