"""The model to plan for, on the meta device: no weights, no values, every shape."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from memo_runtime.errors import ArgumentError
from memo_runtime.integrations.huggingface import can_tile_loss
from memo_runtime.offline.geometries import CONFIGS, MEMO_GPT, unknown_model

#: Tokens of the batch that shows how blocks are called; sizes at the planned length follow from it.
_TOKENS = 64
#: Rows that tables of positions have in front of the first (OPT, BART).
_OFFSET = 2
#: Of a checkpoint or of how it was run, not of a shape.
_SKIPPED = (
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map",
    "attn_implementation", "_attn_implementation",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model on meta and a batch for it.

    Attributes:
        batch: (args, kwargs) of the model call, short.
        tiled_loss: head and loss run by tiles in training, as ``memo.wrap`` arranges it.
        positions: tokens of a sequence that the model is made for, as far as it says; ``learned_positions``: it has a
            table with a row for each, and cannot be given more.
        notes: what a plan of it says besides.
    """

    name: str
    model: nn.Module
    batch: tuple[tuple[Any, ...], dict[str, Any]]
    tiled_loss: bool
    positions: int | None = None
    learned_positions: bool = False
    notes: tuple[str, ...] = ()


def subject_named(
    name: str, *, max_positions: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> Subject:
    """The model called ``name``, or of the config.json at that path.

    ``max_positions``: made for sequences of so many tokens, whatever its config says.

    Raises:
        ArgumentError: neither, or a config of which no causal language model can be made.
    """
    if name in MEMO_GPT:
        with torch.device("meta"):
            model: nn.Module = _memo_gpt(name).to(dtype).train()
        return Subject(name=name, model=model, batch=((_ids(),), {}), tiled_loss=True)
    fields = dict(CONFIGS[name]) if name in CONFIGS else _config_file(name)
    model = _causal_model(name, fields, max_positions, dtype)
    positions = _positions(model)
    return Subject(
        name=name,
        model=model,
        batch=((), {"input_ids": _ids(), "labels": _ids(), "use_cache": False}),
        tiled_loss=True,
        positions=positions,
        learned_positions=positions is not None and _has_table(model, positions),
        notes=_note_on_dtype(fields, dtype),
    )


def _note_on_dtype(fields: Mapping[str, Any], dtype: torch.dtype) -> tuple[str, ...]:
    """A config says how weights are stored, which need not be how they are trained."""
    stored = str(fields.get("dtype") or fields.get("torch_dtype") or "").removeprefix("torch.")
    planned = str(dtype).removeprefix("torch.")
    if stored == planned or stored not in ("float32", "float16", "float64"):
        return ()
    return (f"planned in {planned}, and the config says {stored}: a factory (module:function) is planned as made",)


def _has_table(model: nn.Module, positions: int) -> bool:
    """An embedding, other than that of the vocabulary, has about a row for each position."""
    words = getattr(model, "get_input_embeddings", lambda: None)()
    return any(
        isinstance(module, nn.Embedding) and module is not words and 0 <= module.num_embeddings - positions <= _OFFSET
        for module in model.modules()
    )


def _memo_gpt(name: str) -> nn.Module:
    from memo_runtime.offline.gpt import GPT

    return GPT(*MEMO_GPT[name])


def subject_of(
    name: str,
    model: nn.Module,
    batch: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    max_positions: int | None = None,
) -> Subject:
    """What a user's factory made; whatever is not on meta yet goes there.

    Raises:
        ArgumentError: ``max_positions`` for a table that the factory made.
    """
    moved = _pytree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, batch)
    labels = moved[1].get("labels")
    if isinstance(labels, torch.Tensor):
        # Ids that are their own labels here are two tensors in training: those who make batches copy them.
        moved[1]["labels"] = labels.clone()
    model = model.to("meta").train()
    positions = _positions(model)
    learned = positions is not None and _has_table(model, positions)
    if learned and max_positions is not None:
        raise ArgumentError(f"--max-positions cannot lengthen the table of positions that {name} makes: do it there")
    return Subject(
        name=name,
        model=model,
        batch=moved,
        tiled_loss="labels" in moved[1] and can_tile_loss(model),
        positions=max_positions or positions,
        learned_positions=learned,
    )


def _positions(model: nn.Module) -> int | None:
    """What a config of Hugging Face says, if there is one."""
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def _ids() -> torch.Tensor:
    return torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")


def _config_file(name: str) -> dict[str, Any]:
    if not name.strip():
        raise unknown_model(name)
    path = Path(name)
    if path.is_dir():
        path /= "config.json"
    if not path.exists() and path.suffix != ".json":
        raise unknown_model(name)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"cannot read {path}: {error.strerror or error}; give the path of a config.json") from error
    except ValueError as error:
        raise ArgumentError(f"{name} is not a config.json: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ArgumentError(f"{name} is not a Hugging Face config: it has no field 'model_type'")
    return fields


def _causal_model(
    name: str, fields: Mapping[str, Any], max_positions: int | None, dtype: torch.dtype
) -> nn.Module:
    try:
        transformers: Any = importlib.import_module("transformers")  # of which much has no types
    except ImportError as error:
        raise ArgumentError(f"model {name!r} needs transformers: pip install 'memo-runtime[hf]' ({error})") from error
    transformers.logging.set_verbosity_error()
    shape = {key: value for key, value in fields.items() if key not in _SKIPPED}
    kind = shape.pop("model_type")
    _check_kind(name, kind)
    try:
        config = transformers.AutoConfig.for_model(kind, **shape)
        if max_positions is not None and hasattr(config, "max_position_embeddings"):
            config.max_position_embeddings = max_positions
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # of a config that anybody wrote transformers may raise anything
        said = " ".join(str(error).split())
        raise ArgumentError(
            f"no causal language model of type {kind!r} can be made of {name}: {type(error).__name__}: {said}"
        ) from error
    result: nn.Module = model.train()
    return result


def _check_kind(name: str, kind: str) -> None:
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    known = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind in known:
        return
    near = difflib.get_close_matches(kind, known)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    raise ArgumentError(
        f"{name} has model_type {kind!r}, of which the installed transformers knows no causal language model: {meant}"
        "other models are given as module:factory"
    )
