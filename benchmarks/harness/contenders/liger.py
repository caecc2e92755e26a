"""Liger's tiled MLP and fused linear cross entropy over checkpointing by transformers, with or without its host
offload. The loss is Liger's, not the harness's.
"""

from __future__ import annotations

import torch

from benchmarks.harness.contenders.checkpoint import Checkpoint
from benchmarks.harness.contenders.hf_checkpointing import enable_checkpointing
from benchmarks.harness.contenders.packages import LIGER, SkippedError, imported, need, need_gpu
from benchmarks.harness.geometry import Scope
from benchmarks.harness.job import Job

#: Only the fused loss is patched in; norms and rotary stay those of all contenders.
_PATCHES = {
    "rope": False,
    "rms_norm": False,
    "swiglu": False,
    "cross_entropy": False,
    "fused_linear_cross_entropy": True,
}


class Liger(Checkpoint):
    """Full recomputation, MLPs by tiles of as many tokens as the hidden size, loss without logits."""

    def __init__(self, offload: bool, job: Job) -> None:
        self.offload = offload
        super().__init__(job)

    def install(self) -> None:
        """Tiled MLPs around the same weights, the fused loss in scope ``step``, checkpointing by transformers.

        Raises:
            SkippedError: Liger is not installed or cannot be imported, there is no GPU, or the blocks are no Llama's.
        """
        name = self.job.contender
        need(name, [LIGER])
        need_gpu(name, self.device, "its kernels are Triton's")
        if self.subject.config.model_type != "llama":
            raise SkippedError(f"{name} patches Llama only, not {self.subject.config.model_type}")
        imported(name, LIGER, "liger_kernel.transformers")
        self._tile_mlps()
        if self.subject.settings.scope == Scope.STEP:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=self.subject.model, **_PATCHES)
            self.settings |= {"apply_liger_kernel_to_llama": _PATCHES, "loss": "Liger's own"}
        self.settings |= enable_checkpointing(self.subject, offload=self.offload)

    def _tile_mlps(self) -> None:
        from liger_kernel.transformers import LigerTiledSwiGLUMLP

        for layer in self.subject.layers:
            with torch.device("meta"):
                tiled = LigerTiledSwiGLUMLP(self.subject.config)
            for part in ("gate_proj", "up_proj", "down_proj"):
                setattr(tiled, part, getattr(layer.mlp, part))
            layer.mlp = tiled
        self.settings["LigerTiledSwiGLUMLP"] = {"num_shards": "tokens / hidden size, rounded up"}

    def recomputed_flops(self, tokens: int) -> None:
        """A tiled MLP runs a third time, with a last product that others do not repeat: not counted here."""
        return
