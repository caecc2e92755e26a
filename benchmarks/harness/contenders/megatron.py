"""Megatron-core's ``GPTModel`` under its own recomputation, on one GPU without tensor parallelism.

megatron-full        every layer runs again (``uniform``, one layer at a time), its input is kept
megatron-selective   MLPs run again. Its default is ``core_attn``, of which its configuration says that fused
                     attention need not run again; ``layernorm`` fails without Transformer Engine (0.19.2 asks its
                     FP8 state in any dtype)
megatron-mlp-chunks  ``megatron-full``, with MLPs in chunks (``mlp_chunks_for_training``)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.harness.contenders.base import Training
from benchmarks.harness.contenders.megatron_model import build, forget_tables
from benchmarks.harness.contenders.megatron_weights import joined
from benchmarks.harness.contenders.packages import MEGATRON, TRITON, SkippedError, imported, need
from benchmarks.harness.job import Job
from benchmarks.harness.subject import OnGradients

_FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
#: Contender -> options of Megatron's ``TransformerConfig``.
WAYS: dict[str, dict[str, Any]] = {
    "megatron-full": _FULL,
    "megatron-selective": _SELECTIVE,
    "megatron-mlp-chunks": _FULL,
}
#: Model types whose layers Megatron's local spec has: norms before attention and MLP, none in attention.
_MODELS = ("llama", "starcoder2")
_MLP = ("gate_proj", "up_proj", "down_proj")


class Megatron(Training):
    """Everybody's weights in Megatron's layers."""

    def __init__(self, name: str, job: Job) -> None:
        self.name, self.options = name, WAYS[name]
        super().__init__(job)

    def install(self) -> None:
        """One module with Megatron's layers in the place of all blocks.

        Raises:
            SkippedError: Megatron-core is not installed or cannot be imported, or has no such layers.
        """
        subject = self.subject
        need(self.name, [MEGATRON, TRITON])
        imported(self.name, MEGATRON, "megatron.core.models.gpt.gpt_model")
        if subject.config.model_type not in _MODELS:
            raise SkippedError(
                f"{self.name} has layers like those of {' and '.join(_MODELS)}, not {subject.config.model_type}: "
                "choose another --geometry"
            )
        if subject.shape.windows:
            raise SkippedError(
                f"{self.name} has attention to all tokens before here, and blocks of this geometry have a window of "
                f"{min(subject.shape.windows):,}: choose another --geometry"
            )
        if self.options is _SELECTIVE and not subject.shape.gated:
            raise SkippedError(
                f"{self.name} is for layers without biases: Megatron's checkpoint of an MLP returns its bias, whose "
                "gradient then asks for the checkpoint's again, without end. megatron-full has no such checkpoint"
            )
        super().install()
        found = joined(subject.layers[0], gated=subject.shape.gated, kv_heads=subject.shape.kv_heads)
        self._joined = {one.name: one for one in found}
        self._stack = build(subject, dict(self.options), longest=max(self.job.lengths))
        self._take_weights()
        subject.replace_blocks(self._stack)
        self.settings |= {"TransformerConfig": {**self.options, "transformer_impl": "local"}}

    def _take_weights(self) -> None:
        with torch.no_grad():
            for theirs, layer in zip(self._stack.gpt.decoder.layers, self.subject.layers, strict=True):
                there, wanted = dict(layer.named_parameters()), dict(theirs.named_parameters())
                for name, one in self._joined.items():
                    wanted.pop(name).copy_(one.join(there))
                assert not wanted, f"nothing was put into {', '.join(wanted)}"

    def start(self, tokens: int) -> None:
        """A batch; chunks of as many tokens as the hidden size, as other tiled MLPs here have."""
        super().start(tokens)
        if self.name == "megatron-mlp-chunks":
            chunks = math.ceil(tokens / self.subject.shape.hidden)
            self._stack.gpt.config.mlp_chunks_for_training = chunks
            self.settings["mlp_chunks_for_training"] = chunks

    def finish(self) -> None:
        """Drop the batch, and the tables that Megatron made for its length."""
        super().finish()
        forget_tables()

    def step(self, on_gradients: OnGradients | None = None) -> None:
        """One step; gradients are shown by everybody's names."""
        super().step(None if on_gradients is None else partial(self._show, on_gradients))

    def _show(self, on_gradients: OnGradients, gradients: Mapping[str, torch.Tensor]) -> None:
        named: dict[str, torch.Tensor] = {}
        for name, gradient in gradients.items():
            stack, found, place = name.partition("0.gpt.decoder.layers.")
            if not found:
                named[name] = gradient
                continue
            layer, _, parameter = place.partition(".")
            parts = self._joined[parameter].split(gradient)
            named |= {f"{stack}{layer}.{part}": tensor for part, tensor in parts.items()}
        on_gradients(named)

    def recomputed_flops(self, tokens: int) -> int:
        """Every layer once more to its end, or its MLP: these checkpoints do not stop before the last product."""
        shape = self.subject.shape
        if self.name != "megatron-selective":
            return shape.rerun_flops(tokens, attention=True, last=True)
        return 2 * tokens * shape.blocks * sum(linear.size for linear in shape.linears if linear.name in _MLP)
