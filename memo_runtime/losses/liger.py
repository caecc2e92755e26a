"""Liger's fused linear cross entropy as an engine for the head's loss, where it is right to use it.

Liger's kernels are used below its own autograd function, whose backward multiplies the saved gradients in
place (a second backward with ``retain_graph=True`` scales them twice) and compares grad_output with 1 on the
host. What remains is one synchronisation per call: Liger counts the valid targets with ``.item()``.

By default Liger adds dW over its chunks in the weight's dtype, which for bf16 is wrong by up to several times
the rounding of an ordinary matmul (its issues 512, 827, 1391); ``accum_dtype=torch.float32`` repairs that.
Versions without that option are not used. API read from liger-kernel 0.8.5.

It works through the tokens in chunks, each of which reads and writes all of dW in float32. By default they are at most
as many as the vocabulary is times the hidden size, however few the tokens: of a Llama 1B 32 of 256 tokens at 8,192.
Where a version can be told so (``chunk_mem_const``), they are as large as a tile.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from memo_runtime.losses.tiles import TILE_BYTES, Criterion, Gradients, Head, Wanted

_CONSTANT = "chunk_mem_const"
_MODULE = "liger_kernel.ops.fused_linear_cross_entropy"


@cache
def _load() -> tuple[Callable[..., Any] | None, str]:
    """Liger's forward with gradients, or None and why it cannot be used."""
    for package in ("liger_kernel", "triton"):
        if importlib.util.find_spec(package) is None:
            return None, f"{package} is not installed"
    try:
        forward = importlib.import_module(_MODULE).fused_linear_cross_entropy_forward
    except (ImportError, AttributeError, RuntimeError) as error:  # the reason is handed on, not swallowed
        return None, f"{_MODULE} does not load: {error}"
    if "accum_dtype" not in inspect.signature(forward).parameters:
        return None, "this liger-kernel has no accum_dtype: it would add the weight gradient in bf16"
    return forward, ""


@cache
def _takes_constant(forward: Callable[..., Any]) -> bool:
    """Whether this version can be told how large its chunks are; asked once, not at every step."""
    return _CONSTANT in inspect.signature(forward).parameters


def obstacle(head: Head, criterion: Criterion, *, reduction: str, wanted: Wanted) -> str | None:
    """Why Liger cannot compute this loss; None when it can."""
    if head.hidden.device.type != "cuda":
        return f"the hidden states are on {head.hidden.device.type}, its kernels need CUDA"
    if head.compute not in (torch.bfloat16, torch.float32):
        return f"{head.compute} is not supported"
    if head.hidden.dtype != head.weight.dtype:
        return f"hidden states are {head.hidden.dtype} and the weight is {head.weight.dtype}"
    if reduction == "none":
        return "reduction='none' needs the gradient per token"
    if criterion.logit_scale != 1.0:
        return f"logit_scale={criterion.logit_scale} is not supported"
    if criterion.softcap is not None and criterion.softcap < 0.0:
        return f"softcap={criterion.softcap} is not supported"
    if wanted and not wanted.hidden:
        return "the hidden states need no gradient: it would make none for the weight either"
    return _load()[1] or None


def chunk_bytes(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, constant: int = 1) -> int:
    """Bytes of the logits [chunk, V] that it has at once for hidden states [tokens, width].

    As many tokens as make them ``constant`` times as large as the hidden states, rounded up to a power of two. At 1,
    its own default, they are as few as it can have.
    """
    share = -(-tokens // -(-vocabulary // (constant * width)))
    return min(1 << (share - 1).bit_length(), tokens) * vocabulary * dtype.itemsize


def chunk_constant(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> int:
    """The factor with which its chunks are as large as they can be and no larger than a tile; at least 1."""
    rows = TILE_BYTES["cuda"] // (vocabulary * dtype.itemsize)
    if tokens <= rows:
        return -(-vocabulary // width)
    if not rows:
        return 1
    # So many chunks at least, since each has a power of two; and the largest factor that makes no fewer.
    chunks = -(-tokens // (1 << (rows.bit_length() - 1)))
    return max(1, -(-vocabulary // ((chunks - 1) * width)) - 1)


def evaluate(head: Head, criterion: Criterion, *, reduction: str, wanted: Wanted) -> tuple[Tensor, Gradients]:
    """Loss (a scalar, float32; 0 for a mean of nothing) and its gradients. Call only without an obstacle."""
    forward, reason = _load()
    assert forward is not None, f"liger was chosen although {reason}"
    sizes = (*head.hidden.shape, head.weight.shape[0], head.compute)
    chunks = {_CONSTANT: chunk_constant(*sizes)} if _takes_constant(forward) else {}
    result = forward(
        _input=head.hidden,
        weight=head.weight,
        target=head.target,
        bias=head.bias,
        ignore_index=criterion.ignore_index,
        label_smoothing=criterion.label_smoothing,
        reduction=reduction,
        softcap=criterion.softcap,
        accum_dtype=torch.float32,
        **chunks,
    )
    loss: Tensor = result[0]
    # The gradients end the tuple in every version; what stands between them and the loss has grown.
    by_hidden, by_weight, by_bias = result[-3:]
    return loss, Gradients(
        hidden=by_hidden if wanted.hidden else None,
        weight=by_weight if wanted.weight else None,
        bias=by_bias if wanted.bias else None,
    )
