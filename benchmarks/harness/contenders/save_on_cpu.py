"""Checkpointing with the blocks' inputs in pinned host memory, copied by ``torch.autograd.graph.save_on_cpu``.

This is what Hugging Face's ``gradient_checkpointing_enable(offload=True)`` does: every copy waits for itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu

from benchmarks.harness.contenders.base import BlockForward, replace_forwards
from benchmarks.harness.contenders.checkpoint import Checkpoint, checkpointed


def _offloaded(forward: BlockForward, pin: bool, *args: Any, **kwargs: Any) -> torch.Tensor:
    # Only what the checkpoint itself saves is seen: inside it, its own hooks are.
    with save_on_cpu(pin_memory=pin):
        return checkpointed(forward, *args, **kwargs)


class SaveOnCpu(Checkpoint):
    """Full recomputation, inputs of blocks on the host."""

    def install(self) -> None:
        """Every block under a checkpoint under ``save_on_cpu``."""
        self.subject.tile_loss()
        pin = self.device.type == "cuda"
        replace_forwards(self.subject.layers, lambda forward: partial(_offloaded, forward, pin))
