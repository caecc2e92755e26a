"""Tiny Hugging Face models in float64, one per family, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 97
IMAGE = 20  # 5 x 5 patches and a class token: 26 tokens

_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_DECODER: dict[str, Any] = _ENCODER | {
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Grouped matmuls take no float64.
_EXPERTS: dict[str, Any] = _DECODER | {"experts_implementation": "eager", "num_experts_per_tok": 2}
_GPT2: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 48,
    "n_positions": 64,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5: dict[str, Any] = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
}


def text(*, rows: int, tokens: int, padded: bool = False, left: bool = False, seed: int = 1) -> dict[str, Tensor]:
    """Token numbers and labels; ``padded``: the last row ends early, ``left``: it starts late."""
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    if not (padded or left):
        return {"input_ids": ids, "labels": ids.clone()}
    mask = torch.ones_like(ids)
    mask[-1, -5:] = not padded
    mask[-1, :3] = not left
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def pairs(*, rows: int, tokens: int, padded: bool = False, seed: int = 1) -> dict[str, Tensor]:
    """For an encoder and a decoder: the decoder's sequence is shorter."""
    batch = text(rows=rows, tokens=tokens, padded=padded, seed=seed)
    return batch | {"labels": batch["labels"][:, : tokens - 4].clone()}


def images(*, rows: int, tokens: int = 0, padded: bool = False, seed: int = 1) -> dict[str, Tensor]:
    """Images and classes; there is nothing to pad."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, IMAGE, IMAGE, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.randint(0, 5, (rows,), generator=generator)}


@dataclass(frozen=True)
class Family:
    """How to make a model and a batch; ``fallback``: part of the reason why its blocks are never sliced."""

    model: Any
    config: Any
    settings: dict[str, Any]
    batch: Callable[..., dict[str, Tensor]] = text
    fallback: str = ""
    pads: bool = True

    def make(self, *, seed: int = 0, **changes: Any) -> nn.Module:
        """A model in training mode, the same for the same seed."""
        torch.manual_seed(seed)
        return self.model(self.config(**(self.settings | changes))).double().train()


#: Dropout is on wherever a family has it.
FAMILIES: dict[str, Family] = {
    "llama": Family(transformers.LlamaForCausalLM, transformers.LlamaConfig, _DECODER),
    "llama-dropout": Family(
        transformers.LlamaForCausalLM, transformers.LlamaConfig, _DECODER | {"attention_dropout": 0.1}
    ),
    "llama-eager": Family(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        _DECODER | {"attn_implementation": "eager", "attention_dropout": 0.1},
    ),
    "qwen3": Family(
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config,
        _DECODER | {"head_dim": 8, "tie_word_embeddings": True},
    ),
    "gpt2": Family(transformers.GPT2LMHeadModel, transformers.GPT2Config, _GPT2),
    "gemma3": Family(
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig,
        _DECODER
        | {
            "head_dim": 8,
            "num_hidden_layers": 3,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mixtral": Family(
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig,
        _EXPERTS | {"num_local_experts": 4},
        fallback="depends on data",
    ),
    "qwen3-moe": Family(
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        _EXPERTS | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, "output_router_logits": True},
        fallback="depends on data",
    ),
    "bert": Family(
        transformers.BertForMaskedLM,
        transformers.BertConfig,
        _ENCODER | {"vocab_size": VOCABULARY, "max_position_embeddings": 64},
    ),
    "vit": Family(
        transformers.ViTForImageClassification,
        transformers.ViTConfig,
        _ENCODER
        | {
            "image_size": IMAGE,
            "patch_size": 4,
            "num_labels": 5,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
        },
        batch=images,
        pads=False,
    ),
    "t5": Family(transformers.T5ForConditionalGeneration, transformers.T5Config, _T5, batch=pairs),
}
