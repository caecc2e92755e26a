"""DeepSpeed's set for long contexts on one GPU: inputs of checkpointed blocks on the host, ``TiledMLP``, and in scope
``step`` its tiled logits and loss. Optimizer states stay where everybody's are; ``deepspeed_zero`` has ZeRO-Offload.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.harness.contenders.checkpoint import Checkpoint
from benchmarks.harness.contenders.hf_checkpointing import enable_checkpointing
from benchmarks.harness.contenders.packages import DEEPSPEED, imported, need
from benchmarks.harness.geometry import Scope
from benchmarks.harness.subject import OnGradients

#: The defaults of ``get_checkpoint_hidden_states_offloading_ctx_manager``, said so that a row has them.
_OFFLOAD = {
    "use_pin_memory": True,
    "use_streams": True,
    "min_offload_bytes": 1024,
    "max_fwd_stash_count": 2,
    "max_cpu_buffer_pool_count": 64,
    "keep_last_count": 1,
}
_MANAGER = "deepspeed.runtime.activation_checkpointing.offload_activations"
#: Where its tiles are.
_TILES = "deepspeed.runtime.sequence_parallel.ulysses_sp"
#: Bytes of float32 logits in one tile.
_LOGITS = 1 << 30


class DeepSpeed(Checkpoint):
    """Full recomputation with inputs of blocks on the host, MLPs and loss by tiles."""

    _manager: Any = None

    def install(self) -> None:
        """Checkpointing by transformers, whose blocks DeepSpeed's manager looks for.

        Raises:
            SkippedError: DeepSpeed is not installed, or not with what it needs itself.
        """
        name = self.job.contender
        need(name, [DEEPSPEED])
        self._offloading = imported(name, DEEPSPEED, _MANAGER).get_checkpoint_hidden_states_offloading_ctx_manager
        imported(name, DEEPSPEED, _TILES)

        self.settings |= enable_checkpointing(self.subject)
        cuda = self.device.type == "cuda"
        self._options = _OFFLOAD if cuda else {**_OFFLOAD, "use_pin_memory": False, "use_streams": False}
        for layer in self.subject.layers:
            layer.mlp.forward = _TiledForward(layer.mlp)
        self.settings |= {
            "get_checkpoint_hidden_states_offloading_ctx_manager": self._options,
            "TiledMLP": {"shards": "tokens / hidden size, rounded up"},
        }
        if self.subject.settings.scope == Scope.STEP:
            self.subject.model.forward = _TiledLoss(self.subject.model)
            self.settings |= {"TiledFusedLogitsLoss": {"logits_bytes": _LOGITS}, "loss": "DeepSpeed's own"}

    def start(self, tokens: int) -> None:
        """A batch, and a manager: one keeps host memory for the shapes that it has seen."""
        super().start(tokens)
        self._manager = self._offloading(**self._options)

    def finish(self) -> None:
        """Drop both."""
        super().finish()
        self._manager = None

    def step(self, on_gradients: OnGradients | None = None) -> None:
        """One step inside the manager."""
        with self._manager:
            super().step(on_gradients)

    def recomputed_flops(self, tokens: int) -> None:
        """A tiled MLP runs a third time, with a last product that others do not repeat: not counted here."""
        return


class _TiledForward:
    """An MLP's forward in tiles of as many tokens as the hidden size."""

    def __init__(self, mlp: nn.Module) -> None:
        self._mlp = mlp
        self._forward = mlp.forward

    def __call__(self, hidden: torch.Tensor) -> Any:
        """Tiled, and rerun by DeepSpeed's function in backward."""
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

        shards = math.ceil(hidden.shape[-2] / hidden.shape[-1])
        return TiledMLP.apply(lambda _, part: self._forward(part), self._mlp, hidden, shards, [*self._mlp.parameters()])


class _TiledLoss:
    """A causal language model's forward whose logits exist for one tile at a time."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        """The mean loss of every next token."""
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

        model = self._model
        hidden = model.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        targets = functional.pad(labels[:, 1:], (0, 1), value=-100)
        count = labels.numel() - labels.shape[0]

        def loss(head: nn.Module, part: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            # Divided inside: the head's gradient is made here, before anything outside is known.
            return functional.cross_entropy(head(part).float(), wanted, reduction="sum") / count

        shards = max(1, math.ceil(4 * labels.numel() * model.config.vocab_size / _LOGITS))
        head = model.lm_head
        # DeepSpeed's engine takes the head's gradient once its last tile is done, and a weight only once: one that is
        # the embedding's too is not ready before backward has been there. Nothing else reads its mark.
        tied = head.weight is model.get_input_embeddings().weight
        head.weight.ds_grad_is_ready = not tied
        weights = [] if tied else [head.weight]
        found = TiledFusedLogitsLoss.apply(loss, head, hidden, targets, None, shards, weights, "sum")
        head.weight.ds_grad_is_ready = True
        return SimpleNamespace(loss=found)
