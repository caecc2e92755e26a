"""What a profile was made for, field by field: words for the reader of an error, and a hash of what they leave out.

    model   "1,235,814,400 parameters in 146 tensors of bfloat16, all trained #1f0c4a..."
    blocks  "16 blocks, model.layers.0 to model.layers.15 #ab34..."
    batch   "input_ids int64[2d], labels int64[2d] #99e1..."
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.containers import flatten
from memo_runtime.records import Fingerprint


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def batch_signature(args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """Types and ranks of a batch, without sizes: what decides which code of the model runs."""
    leaves, spec = flatten((tuple(args), kwargs))
    parts = [str(spec)]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            parts.append(f"{leaf.dtype}/{leaf.dim()}")
        else:
            parts.append(repr(leaf) if isinstance(leaf, (bool, str, type(None))) else type(leaf).__name__)
    named = [(f"[{index}]", value) for index, value in enumerate(args)] + list(kwargs.items())
    return _with_words(", ".join(f"{name} {_kind(value)}" for name, value in named), parts)


def _with_words(words: str, parts: Iterable[str]) -> str:
    return f"{words} #{_digest(parts)}"


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_short(value.dtype)}[{value.dim()}d]"
    return repr(value) if isinstance(value, (bool, type(None))) else type(value).__name__


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe_parameters(model: nn.Module) -> str:
    parameters = list(model.parameters())
    frozen = sum(not p.requires_grad for p in parameters)
    dtypes = " and ".join(sorted({_short(p.dtype) for p in parameters})) or "no dtype"
    trained = f"{frozen} of them frozen" if frozen else "all trained"
    return f"{sum(p.numel() for p in parameters):,} parameters in {len(parameters)} tensors of {dtypes}, {trained}"


def classes_of_libraries(blocks: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """Names of the class of each of ``blocks`` and of those that it derives from, where a library has that class.

    Another class of a library is another model, whatever its parameters are called. One of the user's own may be the
    same under another name.
    """
    found = {}
    for name, block in blocks.items():
        own = [base for base in type(block).__mro__ if not base.__name__.startswith("FSDP")]
        if own and _is_of_a_library(own[0]):
            found[name] = tuple(base.__name__ for base in own)
    return found


def _is_of_a_library(kind: type) -> bool:
    top = sys.modules.get(kind.__module__.partition(".")[0])
    places = Path(getattr(top, "__file__", None) or "").parts
    return "site-packages" in places or "dist-packages" in places


def make_fingerprint(
    model: nn.Module, blocks: Sequence[str], batch: str, device_type: str, device_name: str
) -> Fingerprint:
    """The fingerprint of ``model`` with managed ``blocks`` on one device, called with ``batch`` (a signature)."""
    parameters = (
        f"{name}:{tuple(p.shape)}:{p.dtype}:{p.requires_grad}" for name, p in model.named_parameters()
    )
    return Fingerprint(
        model=_with_words(_describe_parameters(model), parameters),
        blocks=_with_words(f"{len(blocks)} blocks, {blocks[0]} to {blocks[-1]}" if blocks else "no blocks", blocks),
        batch=batch,
        torch=".".join(torch.__version__.split(".")[:2]),
        device=f"{device_type}:{device_name}",
    )
