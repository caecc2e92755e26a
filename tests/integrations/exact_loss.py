"""The reference for comparisons in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memo_runtime.integrations.causal_loss import _targets


def exact_causal_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    *,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """``ForCausalLMLoss`` on full logits, without its way down to float32 for float64 logits.

    The reference for comparisons in float64: set it as ``model.loss_function`` of the unwrapped model, whose
    own loss is float32 and so differs from any other by 1e-8 and more.
    """
    target = _targets(labels, shift_labels, ignore_index).to(logits.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).view(-1, vocab_size)
    if num_items_in_batch is None:
        return functional.cross_entropy(logits, target, ignore_index=ignore_index)
    total = functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
    return total / num_items_in_batch
