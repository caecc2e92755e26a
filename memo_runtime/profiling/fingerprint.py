"""What a profile was made for, field by field: words for the reader of an error, and a hash of what they leave out.

    model   "1,235,814,400 parameters in 146 tensors of bfloat16, all trained #1f0c4a..."
    blocks  "16 blocks, model.layers.0 to model.layers.15 #ab34..."
    batch   "input_ids int64[2d], labels int64[2d] #99e1..."
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
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
