"""What is recorded: a model, and how its activations are managed.

Models are built from configs with random weights in bf16. ``small`` is the same code at a size that a CPU runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.harness.contenders.base import replace_forwards
from benchmarks.harness.contenders.checkpoint import checkpointed
from benchmarks.harness.geometry import make_config
from memo_runtime.blocks.stack import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: How a case manages activations: not at all, a checkpoint around every block, or memo's replay of half of the tokens.
MANAGERS = ("unwrapped", "recompute", "replay")
_REPLAY_ALPHA = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run: ``steps`` training steps of ``model`` under ``manager`` with ``optimizer``."""

    model: str
    manager: str
    tokens: int
    sequences: int = 1
    blocks: int = 0
    optimizer: str = "adamw"
    steps: int = 3
    small: bool = False

    @property
    def name(self) -> str:
        """Of its file."""
        blocks = f"-{self.blocks}" if self.blocks else ""
        return f"{self.model}{blocks}-{self.manager}"


def all_cases() -> tuple[Case, ...]:
    """Those of the table; lengths are such that every manager fits in 80 GB."""
    models: tuple[dict[str, Any], ...] = (
        {"model": "llama-8b", "blocks": 2, "tokens": 16384},
        {"model": "llama-8b", "blocks": 4, "tokens": 16384},
        {"model": "qwen3-moe", "blocks": 4, "tokens": 8192},
        {"model": "vit-l", "tokens": 1024, "sequences": 16},
        # Weights and gradients of 32 blocks take 30 GiB; states of AdamW would not fit beside them.
        {"model": "llama-8b", "blocks": 32, "tokens": 4096, "optimizer": "sgd"},
    )
    return tuple(Case(manager=manager, **model) for model in models for manager in MANAGERS)


def shrunk(case: Case) -> Case:
    """``case`` at a size for a CPU."""
    return Case(
        model=case.model, manager=case.manager, tokens=64, sequences=min(2, case.sequences), blocks=2,
        optimizer=case.optimizer, steps=2, small=True,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, its step without the optimizer's part, and its optimizer."""

    model: nn.Module
    loss: Callable[[], torch.Tensor]
    optimizer: torch.optim.Optimizer


def build(case: Case, device: torch.device) -> Subject:
    """The model of ``case`` on ``device``, managed as it says."""
    torch.manual_seed(0)
    makers = {"llama-8b": _llama, "qwen3-moe": _qwen3_moe, "vit-l": _vit}
    model, batch = makers[case.model](case, device)
    made: dict[str, Any] = {"lr": 1e-5, "foreach": True}
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(model.parameters(), **made)
        if case.optimizer == "adamw"
        else torch.optim.SGD(model.parameters(), **made)
    )
    if case.manager == "recompute":
        replace_forwards([ref.module for ref in find_blocks(model)], lambda forward: partial(checkpointed, forward))
    elif case.manager == "replay":
        import memo_runtime as memo

        memo.wrap(model, policy="replay", alpha=_REPLAY_ALPHA, optimizer=optimizer)
    return Subject(model, lambda: model(**batch).loss, optimizer)


def _causal(config: PreTrainedConfig, case: Case, device: torch.device) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with device:
        model = auto.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
    ids = torch.randint(config.vocab_size, (case.sequences, case.tokens), device=device)
    return model, {"input_ids": ids, "labels": ids, "use_cache": False}


def _llama(case: Case, device: torch.device) -> tuple[Any, dict[str, Any]]:
    config = make_config("tiny" if case.small else "llama-8b", tokens=case.tokens, blocks=case.blocks)
    return _causal(config, case, device)


def _qwen3_moe(case: Case, device: torch.device) -> tuple[Any, dict[str, Any]]:
    from transformers import Qwen3MoeConfig

    width = 64 if case.small else 2048
    config = Qwen3MoeConfig(
        vocab_size=512 if case.small else 32768,
        hidden_size=width,
        num_hidden_layers=case.blocks,
        num_attention_heads=4 if case.small else 32,
        num_key_value_heads=2 if case.small else 4,
        head_dim=16 if case.small else 128,
        moe_intermediate_size=3 * width // 8,
        num_experts=4 if case.small else 32,
        num_experts_per_tok=2 if case.small else 8,
        max_position_embeddings=case.tokens,
    )
    return _causal(config, case, device)


def _vit(case: Case, device: torch.device) -> tuple[Any, dict[str, Any]]:
    from transformers import ViTConfig, ViTForImageClassification

    side = 14 * round(case.tokens**0.5)
    config = ViTConfig(
        hidden_size=64 if case.small else 1024,
        num_hidden_layers=2 if case.small else 24,
        num_attention_heads=4 if case.small else 16,
        intermediate_size=256 if case.small else 4096,
        image_size=side,
        patch_size=14,
        num_labels=1000,
    )
    config._attn_implementation = "sdpa"
    with device:
        model = ViTForImageClassification(config).to(torch.bfloat16).train()
    pixels = torch.randn(case.sequences, 3, side, side, device=device, dtype=torch.bfloat16)
    return model, {"pixel_values": pixels, "labels": torch.zeros(case.sequences, dtype=torch.long, device=device)}
