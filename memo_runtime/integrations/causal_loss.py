"""transformers' loss of a causal language model, by tiles.

What ``transformers.loss.loss_utils.ForCausalLMLoss`` does: shift the labels by one unless ``shift_labels``
are given, upcast the logits, cross entropy, mean over the labels that count or sum over
``num_items_in_batch``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from memo_runtime.losses.head_loss import linear_cross_entropy
from memo_runtime.losses.lazy_logits import LazyLogits


class CausalLoss:
    """A ``loss_function`` of a Hugging Face model: by tiles for lazy logits, ``original`` for all others."""

    def __init__(self, original: Callable[..., Tensor], backend: str) -> None:
        self.original = original
        self.backend = backend

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        *,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Loss of logits [..., V] and labels [...]; arguments and results are ``ForCausalLMLoss``'s.

        One difference: float64 logits have a float64 loss, where transformers goes down to float32.

        Raises:
            ValueError: more or fewer labels than tokens, with PyTorch's own text.
        """
        if not isinstance(logits, LazyLogits) or logits.changed or logits.shape[-1] != vocab_size:
            return self.original(
                logits,
                labels,
                vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
                **kwargs,
            )
        target = _targets(labels, shift_labels, ignore_index).to(logits.device)
        hidden, weight, bias = logits.operands()
        hidden = hidden.reshape(-1, hidden.shape[-1])
        tokens, targets = hidden.shape[0], target.shape[0]
        if tokens != targets:
            raise ValueError(f"Expected input batch_size ({tokens}) to match target batch_size ({targets}).")
        # One count per replica (DataParallel) is no divisor of one sum: divide as transformers does.
        several = isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() != 1
        logit_scale, softcap = logits.scale_and_softcap()
        loss = linear_cross_entropy(
            hidden,
            weight,
            target,
            bias=bias,
            ignore_index=ignore_index,
            reduction="sum" if several else "mean",
            num_items=None if several else num_items_in_batch,
            logit_scale=logit_scale,
            softcap=softcap,
            backend=self.backend,
        )
        return loss / num_items_in_batch if several and num_items_in_batch is not None else loss


def _targets(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """The class of every token, [T]: the label of the next one."""
    if shift_labels is None:
        assert labels is not None, "transformers calls the loss only with labels"
        shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.reshape(-1)
