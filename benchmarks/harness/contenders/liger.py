"""Liger's tiled MLP and fused linear cross entropy over checkpointing by transformers, with or without its host
offload. The loss is Liger's, not the harness's.

With ``-kernels`` its norms and rotary positions too, which are on by its own default. Without, they are everybody's.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness.contenders.checkpoint import Checkpoint
from benchmarks.harness.contenders.hf_checkpointing import enable_checkpointing, owner
from benchmarks.harness.contenders.packages import LIGER, SkippedError, imported, need, need_gpu
from benchmarks.harness.geometry import Scope
from benchmarks.harness.job import Job

#: Only the fused loss is patched in; norms and rotary stay those of all contenders. What ``swiglu`` patches would take
#: the place of the tiled MLP, whose kernel it is.
_PATCHES = {
    "rope": False,
    "rms_norm": False,
    "swiglu": False,
    "cross_entropy": False,
    "fused_linear_cross_entropy": True,
}
#: As Liger has them by default.
_KERNELS = {"rope": True, "rms_norm": True}
#: What these put others into the place of, for the whole process, in transformers' module of Llama.
_OF_LLAMA = ("apply_rotary_pos_emb", "LlamaRMSNorm")


class Liger(Checkpoint):
    """Full recomputation, MLPs by tiles of as many tokens as the hidden size, loss without logits."""

    def __init__(self, job: Job, *, offload: bool, kernels: bool = False) -> None:
        self.offload, self.kernels = offload, kernels
        self._before: dict[str, Any] = {}
        super().__init__(job)

    def install(self) -> None:
        """Tiled MLPs around the same weights, the fused loss in scope ``step``, checkpointing by transformers; kernels.

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
        whole = self.subject.settings.scope == Scope.STEP
        if whole or self.kernels:
            self._patch(_PATCHES | (_KERNELS if self.kernels else {}) | {"fused_linear_cross_entropy": whole})
        self.settings |= {"loss": "Liger's own"} if whole else {}
        self.settings |= enable_checkpointing(self.subject, offload=self.offload)

    def _patch(self, patches: dict[str, bool]) -> None:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
        from transformers.models.llama import modeling_llama

        self._before = {name: getattr(modeling_llama, name) for name in _OF_LLAMA}
        # In scope blocks a model around these blocks: their norms are patched, and its own, which never runs.
        apply_liger_kernel_to_llama(model=owner(self.subject), **patches)
        self.settings |= {"apply_liger_kernel_to_llama": patches}

    def close(self) -> None:
        """Give transformers' functions back."""
        from transformers.models.llama import modeling_llama

        for name, before in self._before.items():
            setattr(modeling_llama, name, before)

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
