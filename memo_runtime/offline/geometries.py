"""Models by name: the fields of their Hugging Face configs, or of MEMO's GPT."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from memo_runtime.errors import ArgumentError

_LLAMA_3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def _rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _shape(hidden: int, mlp: int, layers: int, heads: tuple[int, int], head_dim: int = 128) -> dict[str, Any]:
    """``heads``: of queries, of keys."""
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_dim,
    }


#: Published configs; ``llama-1b-d128`` is the 1B of the project's figures, with 16 heads of 128.
CONFIGS: dict[str, Mapping[str, Any]] = {
    "llama-1b": {
        **_LLAMA_3, **_shape(2048, 8192, 16, (32, 8), 64), "rope_parameters": _rope(32.0), "tie_word_embeddings": True,
    },
    "llama-1b-d128": {
        **_LLAMA_3, **_shape(2048, 8192, 16, (16, 8)), "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama-8b": {
        **_LLAMA_3, **_shape(4096, 14336, 32, (32, 8)), "rope_parameters": _rope(8.0), "tie_word_embeddings": False,
    },
    "llama-70b": {
        **_LLAMA_3, **_shape(8192, 28672, 80, (64, 8)), "rope_parameters": _rope(8.0), "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3", **_shape(4096, 12288, 36, (32, 8)), "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960, "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151645,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "mistral-7b": {
        "model_type": "mistral", **_shape(4096, 14336, 32, (32, 8)), "vocab_size": 32768, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768, "sliding_window": None, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}  # fmt: skip

#: MEMO's models (arXiv 2407.12117, table 2): (layers, hidden size, heads); the MLP is four times as wide.
MEMO_GPT: dict[str, tuple[int, int, int]] = {
    "memo-7b": (32, 4096, 32),
    "memo-13b": (40, 5120, 40),
    "memo-30b": (48, 7168, 56),
    "memo-65b": (80, 8192, 64),
}


def known_names() -> tuple[str, ...]:
    """Every name."""
    return (*CONFIGS, *MEMO_GPT)


def unknown_model(name: str) -> ArgumentError:
    """The error for ``name``, with what is near."""
    near = difflib.get_close_matches(name.lower(), known_names(), n=2, cutoff=0.5)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return ArgumentError(
        f"model {name!r} is unknown: {meant}there are {', '.join(known_names())}, the path of a Hugging Face "
        "config.json (nothing is downloaded: of a model of the Hub, save that file), or module:factory, a function "
        "without parameters that returns (model, batch)"
    )
