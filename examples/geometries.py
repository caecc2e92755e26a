"""Model shapes by name, and Hugging Face models with random weights built from them.

``llama-8b`` and ``llama-1b`` are the published Llama 3.1 8B and Llama 3.2 1B configs. ``llama-1b-d128`` is a
1B with heads of 128, which is what attention kernels are fastest at. The tiny ones train in seconds on a
laptop. Models are made on the device that trains them, in the dtype they are trained in: an 8B model in bf16
never exists in float32 or in host memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


class GeometryError(ValueError):
    """No such geometry, or no causal language model can be built from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """A model shape: the fields of its Hugging Face config, and defaults that suit its size.

    ``threads`` is how many a CPU should use; None leaves it to PyTorch.
    """

    name: str
    model_type: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    seq_len: int = 8192
    learning_rate: float = 3e-4
    threads: int | None = None


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA_1B: dict[str, Any] = {
    **_LLAMA_3,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
# Matrices this small are multiplied before a second thread has woken up, and far slower where it has to wait.
_TINY_RUN: dict[str, Any] = {"seq_len": 512, "learning_rate": 3e-3, "threads": 1}
# 257 is enough for bytes and one special token; a multiple of 64 is what matmuls like.
_TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}

GEOMETRIES: dict[str, Geometry] = {
    geometry.name: geometry
    for geometry in (
        Geometry(name="tiny", model_type="llama", fields=_TINY, **_TINY_RUN),
        Geometry(name="qwen3-tiny", model_type="qwen3", fields=_TINY, **_TINY_RUN),
        Geometry(
            name="llama-1b-d128",
            model_type="llama",
            fields={
                **_LLAMA_1B,
                "num_attention_heads": 16,
                "head_dim": 128,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            },
        ),
        Geometry(
            name="llama-1b",
            model_type="llama",
            fields={
                **_LLAMA_1B,
                "num_attention_heads": 32,
                "head_dim": 64,
                "rope_parameters": _llama3_rope(32.0),
            },
        ),
        Geometry(
            name="llama-8b",
            model_type="llama",
            fields={
                **_LLAMA_3,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "tie_word_embeddings": False,
                "rope_parameters": _llama3_rope(8.0),
            },
        ),
    )
}


def find_geometry(name: str) -> Geometry:
    """The geometry called ``name``, or the one in the config.json at that path.

    Raises:
        GeometryError: neither a known name nor a readable Hugging Face config.
    """
    if name in GEOMETRIES:
        return GEOMETRIES[name]
    path = Path(name)
    known = ", ".join(GEOMETRIES)
    if path.is_dir():
        path /= "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        why = error.strerror or error
        raise GeometryError(f"--geometry {name}: {why}; give a config.json or one of {known}") from error
    except ValueError as error:
        raise GeometryError(f"--geometry {name} is not a config.json: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise GeometryError(f"--geometry {name} is not a Hugging Face config: it has no field 'model_type'")
    return Geometry(name=name, model_type=fields.pop("model_type"), fields=fields)


def make_config(geometry: Geometry, *, tokens: int, layers: int | None = None) -> PreTrainedConfig:
    """The Hugging Face config of ``geometry``, with room for ``tokens`` positions, cut to ``layers``.

    Raises:
        GeometryError: the installed transformers cannot make a config from these fields.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        why = "this example builds Hugging Face models"
        raise GeometryError(f"{why}; run: pip install 'memo-runtime[hf]'") from error
    try:
        config: PreTrainedConfig = AutoConfig.for_model(geometry.model_type, **_plain(geometry.fields))
    except Exception as error:  # of a config that anybody wrote transformers may raise anything
        why = f"no config of type {geometry.model_type!r} can be made from it: {' '.join(str(error).split())}"
        raise GeometryError(f"--geometry {geometry.name}: {why}") from error
    if layers is not None:
        kinds = getattr(config, "layer_types", None)
        # Of some configs they follow from the number of layers.
        if kinds and not isinstance(getattr(type(config), "layer_types", None), property):
            config.layer_types = [kinds[i % len(kinds)] for i in range(layers)]
        config.num_hidden_layers = layers
    if getattr(config, "max_position_embeddings", tokens) < tokens:
        config.max_position_embeddings = tokens
    # Keys and values are kept for generation only; in training they would be memory for nothing.
    config.use_cache = False
    return config


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without what belongs to a checkpoint and not to a shape; configs change what they are given."""
    skipped = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map")
    return {
        name: value for name, value in json.loads(json.dumps(dict(fields))).items() if name not in skipped
    }


def build_model(
    config: PreTrainedConfig, *, device: torch.device, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """A causal language model with random weights, made on ``device`` in ``dtype`` from the current seed.

    Raises:
        GeometryError: the config is not one of a causal language model, or has no such attention.
    """
    from transformers import AutoModelForCausalLM

    try:
        with device:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention
            )
    except (ValueError, ImportError) as error:
        raise GeometryError(f"no causal language model can be built: {error}") from error
    return model


def parameter_count(model: torch.nn.Module) -> int:
    """All parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def matmul_parameters(model: PreTrainedModel) -> int:
    """Parameters that take part in matmuls: without the embedding table, with the head, tied or not."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    return parameter_count(model) - (0 if head is table else table.numel())


def attention_width(config: PreTrainedConfig) -> int:
    """Query heads times their size."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_attention_heads * size)
