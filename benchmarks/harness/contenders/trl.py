"""TRL's ``OffloadActivations``, as its trainers enter it: around forward and backward of a step.

Its trainers checkpoint by default, so that what it moves are the inputs of blocks. Without checkpointing it moves all
that autograd saves.

It hooks the output head, so that what that saves stays. A head with hooks has full logits, which nobody else here has:
the hooks are taken off, as there are none where its trainers use Liger's loss, which does not call the head.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.harness.contenders.base import Training
from benchmarks.harness.contenders.hf_checkpointing import enable_checkpointing
from benchmarks.harness.contenders.packages import TRL, imported, need, need_gpu
from benchmarks.harness.job import Job
from benchmarks.harness.subject import OnGradients

#: The defaults of ``get_act_offloading_ctx_manager``, said so that a row has them.
_OPTIONS = {"use_pin_memory": True, "use_streams": True, "min_offload_size": 1024, "max_fwd_stash_size": 5}


def _hooks(head: nn.Module | None) -> list[dict[int, Any]]:
    if head is None:
        return []
    return [head._forward_pre_hooks, head._forward_hooks, head._forward_hooks_always_called]


class TrlOffload(Training):
    """Activations on the host by TRL's context manager, with or without checkpointing."""

    def __init__(self, checkpointing: bool, job: Job) -> None:
        self.checkpointing = checkpointing
        super().__init__(job)

    def install(self) -> None:
        """The manager is made once; each step enters it.

        Raises:
            SkippedError: TRL is not installed, or not with what it needs itself, or there is no GPU.
        """
        need(self.job.contender, [TRL])
        need_gpu(self.job.contender, self.device, "its streams are an accelerator's")
        offloading = imported(self.job.contender, TRL, "trl.models.activation_offloading")
        super().install()
        if self.checkpointing:
            self.settings |= enable_checkpointing(self.subject)
        head = getattr(self.subject.model, "lm_head", None)
        before = [set(table) for table in _hooks(head)]
        self._manager = offloading.get_act_offloading_ctx_manager(
            self.subject.model, warn_if_no_head=False, **_OPTIONS
        )
        for table, known in zip(_hooks(head), before, strict=True):
            for key in set(table) - known:
                del table[key]
        self.settings |= {"get_act_offloading_ctx_manager": _OPTIONS, "hooks_of_the_head": "taken off"}

    def step(self, on_gradients: OnGradients | None = None) -> None:
        """One step inside the manager."""
        with self._manager:
            super().step(on_gradients)

    def recomputed_flops(self, tokens: int) -> int:
        """Every block once more, if it is checkpointed."""
        return self.subject.shape.rerun_flops(tokens, attention=True) if self.checkpointing else 0
