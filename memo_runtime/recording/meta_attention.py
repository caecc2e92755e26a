"""Attention on meta tensors as a GPU would do it.

On the meta device ``scaled_dot_product_attention`` falls apart into products with a matrix of tokens x tokens, which no
long-context run ever has. Here it is the fused operator that CUDA chooses: flash attention, or the memory-efficient one
where there is a mask or values have another width than keys (DeepSeek's latent attention). Both have meta kernels
and gradients.

On the CPU it does so only without dropout, which a model that is tried there for its structure may have.

The function is replaced in ``torch.nn.functional`` while a context is open, and not by a mode: modes are off in the
reruns of checkpoints, since ``Tensor.backward`` is itself a function that modes see.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional


@contextmanager
def fused_attention_on_meta() -> Iterator[None]:
    """While this is open, attention of meta tensors is one operator; that of others is what it was."""
    own: Any = functional.scaled_dot_product_attention

    def attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = (_fused if query.device.type == "meta" else own)(query, *args, **kwargs)
        return result

    with _replaced(attention):
        yield


@contextmanager
def fused_attention_on_cpu() -> Iterator[None]:
    """While this is open, attention drops nothing: only then has the CPU a fused operator. CUDA has one in any case.

    What is saved is the same but for a seed.
    """
    own: Any = functional.scaled_dot_product_attention

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        *given: Any,
        **options: Any,
    ) -> torch.Tensor:
        result: torch.Tensor = own(query, key, value, attn_mask, 0.0, *given, **options)
        return result

    with _replaced(attention):
        yield


@contextmanager
def _replaced(attention: Any) -> Iterator[None]:
    own: Any = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    *given: Any,
    **options: Any,
) -> torch.Tensor:
    causal = bool(given[0] if given else options.get("is_causal", False))
    scale = options.get("scale")
    if attn_mask is None and value.shape[-1] == query.shape[-1]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        result: torch.Tensor = flash(query, key, value, dropout_p, causal, scale=scale)[0]
        return result
    if key.shape[1] != query.shape[1]:  # this operator wants as many heads of keys as of queries
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    bias = None
    if attn_mask is not None:
        bias = torch.empty(attn_mask.shape, dtype=query.dtype, device="meta")
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    masked: torch.Tensor = efficient(query, key, value, bias, True, dropout_p, causal, scale=scale)[0]
    return masked
