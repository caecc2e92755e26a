"""Models to check: tiny ones by name, anyone's by ``module:factory``."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
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

_WANTED = "a function without parameters that returns (model, batch)"

TINY = ("llama", "qwen3", "gpt2")


def make_model(name: str, *, sequences: int, tokens: int) -> tuple[nn.Module, Any]:
    """The model called ``name`` and a batch for it: one of ``TINY``, or what ``module:factory`` returns.

    Raises:
        typer.BadParameter: an unknown name, or a factory that cannot be imported or returns something else.
    """
    if ":" in name:
        return model_from_factory(name)
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


def model_from_factory(name: str) -> tuple[nn.Module, Any]:
    """What ``module:factory`` returns, called once.

    Raises:
        typer.BadParameter: it cannot be imported, fails, or returns something else; with the line of its own error.
    """
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as for python -m
    if not module_name or not attribute:
        raise typer.BadParameter(f"'{name}' is not module:factory, such as mypackage.mymodel:make")
    try:
        factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except Exception as error:  # a module may raise anything when it is imported
        raise typer.BadParameter(f"cannot import '{name}': {_said(error)}{_meant(error)}") from error
    if not callable(factory):
        raise typer.BadParameter(f"'{name}' is {type(factory).__name__}, not a function: {_WANTED}")
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise typer.BadParameter(f"'{name}' was called and raised {_said(error)}; give {_WANTED}") from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise typer.BadParameter(
            f"'{name}' returned {_kinds(made)}; it has to return (model, batch), with the "
            "batch as the model takes it: a dict of keyword arguments, or a tuple of positional ones"
        )
    return made


def _kinds(made: object) -> str:
    if isinstance(made, tuple):
        return f"({', '.join(type(item).__name__ for item in made)})"
    return type(made).__name__


def _said(error: BaseException) -> str:
    """The error, and the line of the user's code that it comes from."""
    said = str(error) if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: {error}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    return f"{said} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else said


def _meant(error: Exception) -> str:
    """Names near one that a module does not have."""
    if not isinstance(error, AttributeError) or error.name is None:
        return ""
    near = difflib.get_close_matches(error.name, dir(error.obj))
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _is_ours(filename: str) -> bool:
    return filename == __file__ or filename.startswith("<frozen") or filename == importlib.__file__
