"""Torch's selective activation checkpointing with torchtitan's policy by operator: what attention and every second
matrix product returned is kept, the rest of a block runs again.

Products are counted apart in forward and in the rerun, from the first of a block on: of a Llama's q, v, gate and down
are kept. torchtitan's models have no biases, so that its policy names products without one; here both kinds count.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

from benchmarks.harness.contenders.base import Training, replace_forwards
from benchmarks.harness.contenders.checkpoint import checkpointed
from benchmarks.harness.contenders.selective import ATTENTION

PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default})


class EverySecond:
    """The policy of one call of a block, and of its rerun."""

    def __init__(self) -> None:
        self._products = {False: 0, True: 0}

    def __call__(
        self, context: SelectiveCheckpointContext, operator: object, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        """Keep what attention returned, and the first of every two products."""
        kept = operator in ATTENTION
        if operator in PRODUCTS:
            self._products[context.is_recompute] += 1
            kept = self._products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def contexts() -> Any:
    """For one call of a block: counts begin anew."""
    return create_selective_checkpoint_contexts(EverySecond())


class SelectiveMm(Training):
    """Recomputation of every second product, and of all that is no product and no attention."""

    def install(self) -> None:
        """Every block under a checkpoint with that policy."""
        super().install()
        replace_forwards(self.subject.layers, lambda forward: partial(checkpointed, forward, context_fn=contexts))

    def recomputed_flops(self, tokens: int) -> int | None:
        """Every second product once more; None where a block has other products than are counted, or experts."""
        shape = self.subject.shape
        there = sum(isinstance(module, nn.Linear) for module in self.subject.layers[0].modules())
        if shape.experts > 1 or there != len(shape.linears):
            return None
        kept = [linear.name for linear in shape.linears][::2]
        return shape.rerun_flops(tokens, attention=False, kept=kept)
