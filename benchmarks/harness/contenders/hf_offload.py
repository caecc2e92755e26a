"""Hugging Face's own checkpointing with block inputs on the host: ``gradient_checkpointing_enable(offload=True)``."""

from __future__ import annotations

from benchmarks.harness.contenders.checkpoint import Checkpoint
from benchmarks.harness.contenders.hf_checkpointing import enable_checkpointing
from benchmarks.harness.contenders.packages import need_gpu


class HfOffload(Checkpoint):
    """Full recomputation by the model's own public method, inputs of blocks on the host."""

    def install(self) -> None:
        """The model's own method in scope ``step``; in scope ``blocks``, a model's around these blocks.

        Raises:
            SkippedError: this transformers has no such argument, or there is no GPU.
        """
        need_gpu("hf-offload", self.device, "it pins host memory")
        self.subject.tile_loss()
        self.settings |= enable_checkpointing(self.subject, offload=True)
