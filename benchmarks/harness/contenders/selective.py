"""Torch's selective activation checkpointing, saving attention: only the rest of a block runs again."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from benchmarks.harness.contenders.base import Training, replace_forwards
from benchmarks.harness.contenders.checkpoint import checkpointed

_NAMES = (
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)
#: Every fused attention that this PyTorch has.
ATTENTION = frozenset(getattr(torch.ops.aten, name).default for name in _NAMES if hasattr(torch.ops.aten, name))


def save_attention(context: object, operator: object, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what attention returned, and nothing else."""
    return CheckpointPolicy.MUST_SAVE if operator in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


class Selective(Training):
    """Recomputation of everything but attention."""

    def install(self) -> None:
        """Every block under a checkpoint that saves attention."""
        super().install()
        contexts = partial(create_selective_checkpoint_contexts, save_attention)
        replace_forwards(self.subject.layers, lambda forward: partial(checkpointed, forward, context_fn=contexts))

    def recomputed_flops(self, tokens: int) -> int:
        """Every block's products once more."""
        return self.subject.shape.rerun_flops(tokens, attention=False)
