"""Tiny Hugging Face models, one per way of treating logits, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48, "vocab_size": VOCABULARY}
_GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}

#: model type -> what its config adds: factors (Granite, Cohere), caps (Gemma), tied heads, experts.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "qwen3": _COMMON | {"tie_word_embeddings": True},
    "gpt2": _GPT2,
    "gemma2": _COMMON | {"final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    "gemma3_text": _COMMON | {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "granite": _COMMON | {"logits_scaling": 6.0},
    "cohere": _COMMON | {"logit_scale": 0.0625},
    "mixtral": _COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "olmo": _COMMON,
    "phi3": _COMMON | {"resid_pdrop": 0.0},
}


def make(family: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A model in training mode, the same for the same seed."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(FAMILIES[family] | changes))
    if family == "mixtral":
        config._experts_implementation = "eager"  # grouped matmuls take no float64
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    return model.train()


def batch(*, rows: int = 3, tokens: int = 13, seed: int = 1) -> dict[str, Tensor]:
    """Odd lengths, a padded row, labels of -100 at both ends and in the middle."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :2] = -100
    labels[rows // 2, tokens // 2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, of parameters that have one; cleared afterwards."""
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def worst_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest relative error of a gradient, and the same parameters have one."""
    assert got.keys() == want.keys()
    return max(
        float((got[name] - value).abs().max() / value.abs().max().clamp(min=1e-30))
        for name, value in want.items()
        if float(value.abs().max()) > 0
    )
