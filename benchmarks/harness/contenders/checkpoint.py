"""``torch.utils.checkpoint`` around every block, non-reentrant: all of it runs again in backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.harness.contenders.base import BlockForward, Training, replace_forwards


def checkpointed(forward: BlockForward, *args: Any, **options: Any) -> torch.Tensor:
    """``forward`` under a checkpoint at its fastest: without dropout there is no random state to put back."""
    result: torch.Tensor = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)
    return result


class Checkpoint(Training):
    """Full recomputation, inputs of blocks on the device."""

    def install(self) -> None:
        """Every block under a checkpoint."""
        super().install()
        replace_forwards(self.subject.layers, lambda forward: partial(checkpointed, forward))

    def recomputed_flops(self, tokens: int) -> int:
        """Every block once more."""
        return self.subject.shape.rerun_flops(tokens, attention=True)
