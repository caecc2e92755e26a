"""Two parts of one attention, over different keys, become one by their log-sum-exps.

    o  =  o_before * exp(lse_before - lse) + o_own * exp(lse_own - lse)        lse = log(exp(lse_before) + exp(lse_own))

in float32 (in float64 where they are). On a GPU that is one kernel (``merging_gpu.py``), which reads both parts once
and writes the result to its place; operator by operator, what chunks save would be lost again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch

logger = logging.getLogger("memo_runtime")

#: What the GPU's kernel takes.
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Part:
    """Attention over some keys: ``output`` [B, H, S, D], ``lse`` [B, H, S] or [B, H, S, 1]."""

    output: torch.Tensor
    lse: torch.Tensor


def merge_into(place: Part, own: Part, before: Part) -> None:
    """Write both parts together to ``place``; ``own`` has at least one key in each row."""
    if _has_kernel(own.output.device.type, own.output.dtype):
        from memo_runtime.execution.mixers.merging_gpu import merge_on_gpu

        tensors = ((one.output, one.lse.reshape(own.output.shape[:3])) for one in (own, before))
        merge_on_gpu((place.output, place.lse.view(own.output.shape[:3])), *tensors)
        return
    if own.output.device.type == "cuda" and own.output.dtype in _KERNEL_DTYPES:
        _say_that_it_is_slow()
    wide = torch.promote_types(own.output.dtype, torch.float32)
    share = torch.sigmoid(before.lse.to(wide) - own.lse.to(wide)).reshape(*own.output.shape[:3], 1)
    place.output.copy_(own.output.to(wide).lerp_(before.output.to(wide), share))
    place.lse.copy_(torch.logaddexp(own.lse, before.lse))


def merge_bytes(shape: tuple[int, int, int], size: int, dtype: torch.dtype, device_type: str) -> int:
    """Most bytes that a chunk of ``size`` queries takes beside the whole result: both parts, and where operators merge
    them the same in a wider dtype. ``shape``: of the result, (sequences, heads, size of a head).
    """
    wide = 0 if _has_kernel(device_type, dtype) else torch.promote_types(dtype, torch.float32).itemsize
    sequences, heads, depth = shape
    return sequences * heads * depth * size * 2 * (dtype.itemsize + wide)


def _has_kernel(device_type: str, dtype: torch.dtype) -> bool:
    return device_type == "cuda" and dtype in _KERNEL_DTYPES and _has_triton()


@lru_cache(maxsize=1)
def _say_that_it_is_slow() -> None:
    logger.warning("memo: chunks of attention are merged operator by operator, since Triton compiles nothing here")


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    # By PyTorch's own test: a package of that name that compiles nothing here is none.
    from torch.utils._triton import has_triton

    return bool(has_triton())
