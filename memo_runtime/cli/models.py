"""Models to check: tiny ones by name, anyone's by ``module:factory``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import typer
from torch import nn

#: One size for all: small enough for a CPU in seconds, with grouped heads and several blocks.
_VOCABULARY = 512
_WIDTH = 64
_LAYERS = 4
_HEADS = 4
_LENGTH = 4096

TINY = ("llama", "qwen3", "gpt2")


def make_model(name: str, *, sequences: int, tokens: int) -> tuple[nn.Module, Any]:
    """The model called ``name`` and a batch for it: one of ``TINY``, or what ``module:factory`` returns.

    Raises:
        typer.BadParameter: an unknown name, or a factory that cannot be imported or returns something else.
    """
    if ":" in name:
        return _from_factory(name)
    if name not in TINY:
        known = ", ".join(TINY)
        raise typer.BadParameter(f"'{name}' is unknown; there are {known}, or module:factory")
    try:
        transformers: Any = importlib.import_module("transformers")  # of which much has no types
    except ImportError as error:
        raise typer.BadParameter(
            f"'{name}' needs transformers: pip install 'memo-runtime[hf]' ({error})"
        ) from error
    transformers.logging.set_verbosity_error()  # its remarks on configs are not about the check
    ids = torch.randint(_VOCABULARY, (sequences, tokens))
    return _tiny(name), {"input_ids": ids, "labels": ids}


def _tiny(name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

    common: dict[str, Any] = {"vocab_size": _VOCABULARY, "max_position_embeddings": _LENGTH}
    grouped: dict[str, Any] = {
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS // 2,
        "head_dim": _WIDTH // _HEADS,
    }
    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: LlamaConfig(**common, **grouped),
        "qwen3": lambda: Qwen3Config(**common, **grouped),
        "gpt2": lambda: GPT2Config(
            **common, n_embd=_WIDTH, n_layer=_LAYERS, n_head=_HEADS, bos_token_id=0, eos_token_id=0
        ),
    }
    auto: Any = AutoModelForCausalLM  # its methods have no types
    model = auto.from_config(configs[name]())
    assert isinstance(model, nn.Module)
    return model


def _from_factory(name: str) -> tuple[nn.Module, Any]:
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as for python -m
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"cannot import '{name}': {error}") from error
    made = factory()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise typer.BadParameter(
            f"'{name}' returned {type(made).__name__}; it has to return (model, batch), with the "
            "batch as the model takes it: a dict of keyword arguments, or a tuple of positional ones"
        )
    return made
