"""What a profile was made for, as short hashes that can be compared field by field."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from memo_runtime.records import Fingerprint


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def batch_signature(args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """Types and ranks of a batch, without sizes: what decides which code of the model runs."""
    leaves, spec = _pytree.tree_flatten((tuple(args), kwargs))
    parts = [str(spec)]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            parts.append(f"{leaf.dtype}/{leaf.dim()}")
        else:
            parts.append(repr(leaf) if isinstance(leaf, (bool, str, type(None))) else type(leaf).__name__)
    return _digest(parts)


def make_fingerprint(
    model: nn.Module, blocks: Sequence[str], batch: str, device_type: str, device_name: str
) -> Fingerprint:
    """The fingerprint of ``model`` with managed ``blocks`` on one device, called with ``batch`` (a signature)."""
    parameters = (
        f"{name}:{tuple(p.shape)}:{p.dtype}:{p.requires_grad}" for name, p in model.named_parameters()
    )
    return Fingerprint(
        model=_digest(parameters),
        blocks=_digest(blocks),
        batch=batch,
        torch=".".join(torch.__version__.split(".")[:2]),
        device=f"{device_type}:{device_name}",
    )
