"""What is trained: Hugging Face decoder layers with SDPA attention, random weights, one sequence.

All contenders train the same object, made from the same seed. Layers run with one attention kernel for everyone,
which is chosen once for forward and backward: reruns in backward read the choice again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.counted import (
    NO_MODEL,
    check_calls,
    check_layers,
    check_windows,
    find_windows,
    keeps_blocks,
    refusal,
)
from benchmarks.harness.geometry import Scope, Shape, make_config, make_shape
from benchmarks.harness.job import Settings
from memo_runtime.config import Loss
from memo_runtime.integrations import huggingface

#: Called between backward and optimizer with the gradients by name.
OnGradients = Callable[[Mapping[str, torch.Tensor]], None]

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention_kernel(name: str) -> AbstractContextManager[Any]:
    """The one kernel that attention may use; ``auto`` leaves it to PyTorch."""
    return nullcontext() if name == "auto" else sdpa_kernel([BACKENDS[name]])


class BlockStack(nn.Module):
    """Decoder layers and the rotary tables they share, and nothing else."""

    def __init__(self, layers: nn.ModuleList, rotary: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.rotary_emb = rotary

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [1, tokens, hidden] through every block, causally."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        tables = self.rotary_emb(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=tables)
        return hidden


class _NoTables(nn.Module):
    """In the place of rotary tables that nothing reads."""

    def forward(self, *_: Any, **__: Any) -> None:
        """None."""


class Subject:
    """The model of a job, its optimizer if it has one, and one step of it.

    Attributes:
        model: what a contender may change and wrap. layers: its blocks.
        ties_loss: head and loss were arranged to run by tiles.
    """

    def __init__(self, settings: Settings, *, longest: int, attention: str = "sdpa") -> None:
        self.settings = settings
        self._attention = attention
        self.device = torch.device(settings.device)
        self.config = make_config(settings.geometry, tokens=longest, blocks=settings.blocks)
        shape = make_shape(self.config, settings.scope, rank=settings.lora or 0)
        torch.manual_seed(settings.seed)
        made = self._build()
        self.shape: Shape = replace(shape, windows=find_windows(self.config, made))
        check_windows(self.shape, settings.scope, longest)
        self.model = made.train() if settings.scope == Scope.STEP else self._stack(made)
        self.layers = _find_layers(self.model)
        if settings.lora is not None:
            _add_adapters(self.model, self.layers, settings.lora)
        check_layers(self.layers, self.shape)
        self.optimizer = self._optimizer()
        self._loss: Any = None

    def _build(self) -> nn.Module:
        from transformers import AutoModel, AutoModelForCausalLM

        made: dict[str, Any] = {"dtype": getattr(torch, self.settings.dtype), "attn_implementation": self._attention}
        if self.settings.scope == Scope.BLOCKS:
            # An embedding comes with the layers; of one row, since nothing reads it.
            self.config.vocab_size, self.config.pad_token_id = 1, None
        kind = AutoModelForCausalLM if self.settings.scope == Scope.STEP else AutoModel
        try:
            with self.device:
                found: nn.Module = kind.from_config(self.config, **made)
        except NO_MODEL as error:
            raise refusal(error, self.config, self._attention) from error
        whole = found.base_model if self.settings.scope == Scope.STEP else found
        if not keeps_blocks(whole):
            raise refusal(ValueError("it has no layers with rotary_emb"), self.config, self._attention)
        return found

    def _stack(self, whole: nn.Module) -> BlockStack:
        layers, rotary = whole.layers, whole.rotary_emb
        assert isinstance(layers, nn.ModuleList), "it keeps its blocks there"
        assert isinstance(rotary, nn.Module), "and makes their tables"
        check_calls(list(layers), rotary)
        stack = BlockStack(layers, rotary)
        stack.train()
        return stack

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if self.settings.scope == Scope.BLOCKS:
            # Never stepped: it says that there are no states and takes no time, where AdamW's would be assumed.
            return torch.optim.SGD(parameters[:1], lr=0.0)
        return torch.optim.AdamW(parameters, lr=self.settings.learning_rate, fused=self.device.type == "cuda")

    @property
    def stack(self) -> nn.Module:
        """The module that calls the blocks: its ``layers`` are these, its ``rotary_emb`` makes their rotary tables."""
        found = self.model.base_model if self.settings.scope == Scope.STEP else self.model
        assert isinstance(found, nn.Module), "it is the model, or a part of it"
        return found

    def replace_blocks(self, whole: nn.Module) -> None:
        """Run ``whole`` in the place of all blocks, and train its parameters; it makes its own rotary tables."""
        self.stack.layers = nn.ModuleList([whole])
        self.stack.rotary_emb = _NoTables()
        self.layers = [whole]
        self.optimizer = self._optimizer()

    def tile_loss(self) -> None:
        """Head and loss by tiles, as ``memo.wrap`` arranges it, for contenders that do not wrap."""
        if self.settings.scope == Scope.STEP and self._loss is None:
            self._loss = huggingface.install(self.model, loss=Loss(self.settings.loss))

    @property
    def full_logits(self) -> tuple[str, ...]:
        """Why the loss of a contender that does not wrap had full logits; empty where it ran by tiles."""
        return self._loss.full_logits if self._loss is not None else ()

    def batch(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(input, target) of ``tokens``: token ids twice, or hidden states and the gradient of their result."""
        generator = torch.Generator(self.device).manual_seed(self.settings.seed + tokens)
        if self.settings.scope == Scope.STEP:
            ids = torch.randint(self.config.vocab_size, (1, tokens), generator=generator, device=self.device)
            return ids, ids
        dtype, size = getattr(torch, self.settings.dtype), (1, tokens, self.config.hidden_size)
        hidden, gradient = (torch.randn(size, generator=generator, device=self.device, dtype=dtype) for _ in range(2))
        return hidden.requires_grad_(), gradient

    def step(self, batch: tuple[torch.Tensor, torch.Tensor], on_gradients: OnGradients | None = None) -> None:
        """Forward, backward and, in scope ``step``, the optimizer; no gradient is left behind."""
        self.backward(batch, on_gradients)
        if self.settings.scope == Scope.STEP:
            self.optimizer.step()
        self.clear(batch)

    def backward(self, batch: tuple[torch.Tensor, torch.Tensor], on_gradients: OnGradients | None = None) -> None:
        """Forward and backward; gradients stay."""
        args, kwargs = self.call(batch)
        with attention_kernel(self.settings.attention):
            if self.settings.scope == Scope.STEP:
                self.model(*args, **kwargs).loss.backward()
            else:
                self.model(*args, **kwargs).backward(batch[1])
        if on_gradients is not None:
            on_gradients(self._gradients(batch[0]))

    def call(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """What the model is called with."""
        if self.settings.scope == Scope.STEP:
            return (), {"input_ids": batch[0], "labels": batch[1], "use_cache": False}
        return batch[:1], {}

    def _gradients(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        named = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return named if inputs.grad is None else {**named, "input": inputs.grad}

    def clear(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Drop all gradients."""
        self.model.zero_grad(set_to_none=True)
        batch[0].grad = None


def _add_adapters(model: nn.Module, layers: Sequence[nn.Module], rank: int) -> None:
    """PEFT's LoRA beside every linear module of ``layers``, in its dtype; all else is frozen.

    Their second matrices are no zeros, as they would be at first: gradients of the others are looked at too.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inside = {module for layer in layers for module in layer.modules()}
    wanted = [name for name, module in names.items() if module in inside]
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=wanted, init_lora_weights=False), model
    )  # fmt: skip


def _find_layers(model: nn.Module) -> list[nn.Module]:
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(stacks[0])
