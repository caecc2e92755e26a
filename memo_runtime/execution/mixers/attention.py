"""Scaled dot-product attention in two halves.

PyTorch's fused kernels yield their output and the log-sum-exp of each row, and their backward needs nothing else beside
queries, keys and values. Called here as operators, so forward is run once and backward starts from what was saved,
while queries, keys and values are rebuilt. Which kernels may serve a call is PyTorch's to say, and what the caller
allows (``torch.nn.attention.sdpa_kernel`` around the forward). Of these the one that was fastest when they were timed
(``tiled_timing.py``) is taken, else the first of cuDNN, flash, memory-efficient; if that was faster, forward by chunks
of queries (``by_queries.py``). What no fused kernel takes (a bias that needs a gradient, dropout on CPU), or may take,
goes in chunks of queries with autograd inside (``by_rows.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from memo_runtime.blocks.operators import MASKED_ATTENTION
from memo_runtime.execution.mixers.by_queries import Attend, forward_by_queries
from memo_runtime.execution.mixers.by_rows import RowsAttention
from memo_runtime.records import attention_text

aten = torch.ops.aten
#: Attention under spans (``masked.py``): an operator that stands for the kernels in it.
SPANS = MASKED_ATTENTION.replace(".", "::")
Tensors = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """What one attention call asks for, beside its tensors."""

    dropout: float
    causal: bool
    scale: float
    grouped: bool

    @classmethod
    def of(cls, named: dict[str, Any], depth: int) -> Settings:
        """From the arguments of ``aten.scaled_dot_product_attention``, or of attention under spans.

        ``depth``: size of a head.
        """
        scale = named.get("scale")
        return cls(
            dropout=float(named.get("dropout_p", 0.0)),
            causal=bool(named.get("is_causal")),
            scale=float(scale) if scale is not None else depth**-0.5,
            grouped=bool(named.get("enable_gqa")),
        )


@dataclass(frozen=True, slots=True)
class Kernel:
    """What runs an attention: ``name``, and in forward ``queries`` of them at a time; 0: all."""

    name: str
    queries: int = 0

    def text(self, groups: int = 1) -> str:
        """What reports say, where heads go in ``groups``."""
        return attention_text(self.name, groups, self.queries)


@dataclass(slots=True)
class Saved:
    """What a forward leaves for its backward: tensors, and the numbers that go with them."""

    kernel: Kernel
    tensors: Tensors
    numbers: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Inputs:
    """Tensors of one attention call, [B, H, S, D] each; the mask broadcasts to [B, H, S, S]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None


def kernels_for(inputs: Inputs, settings: Settings) -> Iterator[str]:
    """Names of the kernels that may serve this call, the usual one first; at least one.

    One at a time: to ask for the memory-efficient kernel takes keys and values as wide as it wants them.
    """
    query, backends = inputs.query, torch.backends.cuda
    if query.device.type == "cpu":
        wide = query.shape[-1] == inputs.value.shape[-1]
        # On a GPU the questions below are answered by what is enabled now; here it is the one fused kernel there is.
        fused = settings.dropout == 0.0 and wide and backends.flash_sdp_enabled()
        yield "cpu" if fused else "rows"
        return
    params = backends.SDPAParams(
        query, inputs.key, inputs.value, inputs.mask, settings.dropout, settings.causal, settings.grouped
    )
    # cuDNN masks whole rows differently, so masks go to the kernel that PyTorch itself prefers for them.
    fused = False
    if inputs.mask is None and backends.can_use_cudnn_attention(params):
        fused = True
        yield "cudnn"
    if inputs.mask is None and query.shape[-1] % 8 == 0 and backends.can_use_flash_attention(params):
        fused = True
        yield "flash"
    expanded = _expanded(inputs)
    params = backends.SDPAParams(
        query, expanded.key, expanded.value, inputs.mask, settings.dropout, settings.causal, False
    )
    if backends.can_use_efficient_attention(params):
        yield "efficient"
    elif not fused:
        yield "rows"


def attention_forward(
    inputs: Inputs, settings: Settings, *, seed: int, by_rows: bool = False, kernel: Kernel | None = None
) -> tuple[torch.Tensor, Saved]:
    """(output, what backward needs beside the inputs); ``seed`` draws dropout where no fused kernel does.

    ``by_rows``: no fused kernel, since the mask needs a gradient or the dropout must be known. ``kernel``: the one to
    take, if it may serve this call; ``SPANS`` where the mask is spans.
    """
    if by_rows:
        name, queries = "rows", 0
    elif kernel is not None and kernel.name == SPANS:
        name, queries = SPANS, 0
    elif kernel is not None and kernel.name in kernels_for(inputs, settings):
        name, queries = kernel.name, kernel.queries
    else:
        name, queries = next(kernels_for(inputs, settings)), 0
    if queries and by_queries_allowed(name, inputs, settings) and queries < inputs.query.shape[2]:
        return _forward_by_queries(Kernel(name, queries), inputs, settings)
    return _FORWARD[name](inputs, settings, seed)


def by_queries_allowed(name: str, inputs: Inputs, settings: Settings) -> bool:
    """Whether kernel ``name`` can take queries in chunks: causal attention of a sequence with itself, and no more."""
    same = inputs.query.shape[2] == inputs.key.shape[2]
    return name != "rows" and settings.causal and same and inputs.mask is None and settings.dropout == 0.0


def has_lse(saved: Saved) -> bool:
    """The first of its tensors is the log-sum-exp of each row."""
    return saved.kernel.name in _FORWARD and saved.kernel.name != "rows"


def attention_backward(
    grad: torch.Tensor, inputs: Inputs, output: torch.Tensor, saved: Saved, settings: Settings
) -> Tensors:
    """Gradients of query, key, value and mask; that of the mask is None unless it was asked for."""
    return _BACKWARD[saved.kernel.name](grad, inputs, output, saved, settings)


# ---- keys and values shared by groups of heads


def _expanded(inputs: Inputs) -> Inputs:
    """Keys and values repeated for each head of queries, for kernels that know no groups."""
    groups = inputs.query.shape[1] // inputs.key.shape[1]
    if groups == 1:
        return inputs
    key, value = (part.repeat_interleave(groups, dim=1) for part in (inputs.key, inputs.value))
    return Inputs(inputs.query, key, value, inputs.mask)


def _summed(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    groups = grad.shape[1] // like.shape[1]
    return grad if groups == 1 else grad.unflatten(1, (-1, groups)).sum(2)


def _additive(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """A boolean mask as one that is added."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


# ---- CPU


def _cpu_forward(inputs: Inputs, settings: Settings, seed: int) -> tuple[torch.Tensor, Saved]:
    wide = _expanded(inputs)
    output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        wide.query, wide.key, wide.value, 0.0, settings.causal,
        attn_mask=_cpu_mask(inputs), scale=settings.scale,
    )  # fmt: skip
    return output, Saved(Kernel("cpu"), (lse,))


def _cpu_mask(inputs: Inputs) -> torch.Tensor | None:
    mask = _additive(inputs.mask, inputs.query)
    if mask is None or mask.dim() == 2:
        return mask
    return mask[(None,) * (4 - mask.dim())]


def _cpu_backward(
    grad: torch.Tensor, inputs: Inputs, output: torch.Tensor, saved: Saved, settings: Settings
) -> Tensors:
    wide = _expanded(inputs)
    query, key, value = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, wide.query, wide.key, wide.value, output, saved.tensors[0], 0.0, settings.causal,
        attn_mask=_cpu_mask(inputs), scale=settings.scale,
    )  # fmt: skip
    return query, _summed(key, inputs.key), _summed(value, inputs.value), None


# ---- CUDA


def _flash_forward(inputs: Inputs, settings: Settings, seed: int) -> tuple[torch.Tensor, Saved]:
    output, lse, first, second, longest, longest_k, state, unused, _ = aten._scaled_dot_product_flash_attention(
        inputs.query, inputs.key, inputs.value, settings.dropout, settings.causal, False, scale=settings.scale
    )
    return output, Saved(Kernel("flash"), (lse, first, second, state, unused), (longest, longest_k))


def _flash_backward(
    grad: torch.Tensor, inputs: Inputs, output: torch.Tensor, saved: Saved, settings: Settings
) -> Tensors:
    lse, first, second, state, unused = saved.tensors
    grads = aten._scaled_dot_product_flash_attention_backward(
        grad, inputs.query, inputs.key, inputs.value, output, lse, first, second, *saved.numbers,
        settings.dropout, settings.causal, state, unused, scale=settings.scale,
    )  # fmt: skip
    return (*grads, None)


def _cudnn_forward(inputs: Inputs, settings: Settings, seed: int) -> tuple[torch.Tensor, Saved]:
    output, lse, first, second, longest, longest_k, state, offset, _ = aten._scaled_dot_product_cudnn_attention(
        inputs.query, inputs.key, inputs.value, None, True, settings.dropout, settings.causal, False,
        scale=settings.scale,
    )  # fmt: skip
    return output, Saved(Kernel("cudnn"), (lse, first, second, state, offset), (longest, longest_k))


def _cudnn_backward(
    grad: torch.Tensor, inputs: Inputs, output: torch.Tensor, saved: Saved, settings: Settings
) -> Tensors:
    lse, first, second, state, offset = saved.tensors
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        grad, inputs.query, inputs.key, inputs.value, output, lse, state, offset, None, first, second,
        *saved.numbers, settings.dropout, settings.causal, scale=settings.scale,
    )  # fmt: skip
    return (*grads[:3], None)


def _efficient_mask(inputs: Inputs) -> torch.Tensor | None:
    """The mask with rows that start at multiples of 16 bytes, as the kernel wants them."""
    mask = _additive(inputs.mask, inputs.query)
    if mask is None:
        return None
    keys = mask.shape[-1]
    if mask.stride(-1) != 1 or keys % 8:
        mask = torch.nn.functional.pad(mask, (0, -keys % 8))[..., :keys]
    query = inputs.query
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], keys)


def _efficient_forward(inputs: Inputs, settings: Settings, seed: int) -> tuple[torch.Tensor, Saved]:
    wide = _expanded(inputs)
    output, lse, state, offset = aten._scaled_dot_product_efficient_attention(
        wide.query, wide.key, wide.value, _efficient_mask(inputs), True, settings.dropout, settings.causal,
        scale=settings.scale,
    )  # fmt: skip
    return output, Saved(Kernel("efficient"), (lse, state, offset))


def _efficient_backward(
    grad: torch.Tensor, inputs: Inputs, output: torch.Tensor, saved: Saved, settings: Settings
) -> Tensors:
    wide = _expanded(inputs)
    lse, state, offset = saved.tensors
    query, key, value, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, wide.query, wide.key, wide.value, _efficient_mask(inputs), output, lse, state, offset,
        settings.dropout, [True, True, True, False], settings.causal, scale=settings.scale,
    )  # fmt: skip
    return query, _summed(key, inputs.key), _summed(value, inputs.value), None


# ---- chunks of queries


def _forward_by_queries(kernel: Kernel, inputs: Inputs, settings: Settings) -> tuple[torch.Tensor, Saved]:
    """By a fused kernel; what it leaves is what its backward of the whole wants."""
    left: list[Saved] = []
    attend = _attend(kernel.name, settings, left)
    output, lse = forward_by_queries(attend, inputs.query, inputs.key, inputs.value, kernel.queries)
    (part,), tokens = left, inputs.query.shape[2]
    if kernel.name == "efficient":  # its rows of log-sum-exps are filled up, with what adds nothing
        lse = torch.nn.functional.pad(lse, (0, -tokens % 32), value=float("inf"))
    # The numbers are the longest sequences of queries and keys.
    return output, Saved(kernel, (lse, *part.tensors[1:]), (tokens,) * len(part.numbers))


def _attend(name: str, settings: Settings, left: list[Saved]) -> Attend:
    """Kernel ``name`` on parts of an attention; ``left``: what the last one leaves."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given, how = Inputs(query, key, value, None), replace(settings, causal=causal)
        output, saved = _FORWARD[name](given, how, 0)
        lse = saved.tensors[0]
        assert lse is not None, "a fused kernel yields it first"
        left[:] = [saved]
        return output, lse

    return attend


def _rows_forward(inputs: Inputs, settings: Settings, seed: int) -> tuple[torch.Tensor, Saved]:
    rows = RowsAttention(settings.scale, settings.causal, settings.dropout, seed)
    return rows.forward(inputs.query, inputs.key, inputs.value, inputs.mask), Saved(Kernel("rows"), (), (seed,))


def _rows_backward(
    grad: torch.Tensor, inputs: Inputs, output: torch.Tensor, saved: Saved, settings: Settings
) -> Tensors:
    rows = RowsAttention(settings.scale, settings.causal, settings.dropout, saved.numbers[0])
    return rows.backward(grad, inputs.query, inputs.key, inputs.value, inputs.mask)


# ---- spans


def _spans_forward(inputs: Inputs, settings: Settings, seed: int) -> tuple[torch.Tensor, Saved]:
    forward = torch.ops.memo_runtime.masked_attention
    output, lse = forward(inputs.query, inputs.key, inputs.value, inputs.mask, settings.scale)
    return output, Saved(Kernel(SPANS), (lse,))


def _spans_backward(
    grad: torch.Tensor, inputs: Inputs, output: torch.Tensor, saved: Saved, settings: Settings
) -> Tensors:
    backward = torch.ops.memo_runtime.masked_attention_backward
    grads = backward(
        grad, inputs.query, inputs.key, inputs.value, inputs.mask, output, saved.tensors[0], settings.scale
    )
    return (*grads, None)


_FORWARD: dict[str, Callable[[Inputs, Settings, int], tuple[torch.Tensor, Saved]]] = {
    "cpu": _cpu_forward,
    "flash": _flash_forward,
    "cudnn": _cudnn_forward,
    "efficient": _efficient_forward,
    "rows": _rows_forward,
    SPANS: _spans_forward,
}
_BACKWARD: dict[str, Callable[[torch.Tensor, Inputs, torch.Tensor, Saved, Settings], Tensors]] = {
    "cpu": _cpu_backward,
    "flash": _flash_backward,
    "cudnn": _cudnn_backward,
    "efficient": _efficient_backward,
    "rows": _rows_backward,
    SPANS: _spans_backward,
}
