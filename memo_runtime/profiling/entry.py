"""Whether what the first block is given goes when the forward is over, or somebody goes on holding it.

An embedding's result is held by the frames of the model's forward alone: while blocks go backward nothing of it is
there, unless the first block keeps it. A tensor of the caller's stays, and so does one that an operator in front of the
blocks has saved for its own backward (``tanh`` saves its result).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

#: Operators in front of the blocks that are looked at. Of more nothing is said.
_MOST = 64


def is_saved_in_front(hidden: torch.Tensor) -> bool:
    """An operator that led to ``hidden`` has saved its memory, or there are too many to tell."""
    key = hidden.untyped_storage()._cdata
    pending, seen = [hidden.grad_fn], set()
    while pending:
        node: Any = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if len(seen) > _MOST or any(one.untyped_storage()._cdata == key for one in _saved(node)):
            return True
        pending.extend(before for before, _ in node.next_functions)
    return False


def leaves_in_front(given: Iterable[torch.Tensor]) -> set[int]:
    """Ids of the leaves (parameters) that led to ``given``."""
    pending, seen = [one.grad_fn for one in given], set()
    found = {id(one) for one in given if one.grad_fn is None}
    while pending:
        node: Any = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        pending.extend(before for before, _ in node.next_functions)
    return found


def _saved(node: Any) -> Iterator[torch.Tensor]:
    names = [name for name in dir(node) if name.startswith("_saved_")]
    for name in [*names, "saved_tensors"]:  # the last of an autograd.Function
        try:
            value = getattr(node, name, None)
        except RuntimeError:
            continue  # written to since, which its own backward will refuse
        yield from (one for one in (value if isinstance(value, (list, tuple)) else [value])
                    if isinstance(one, torch.Tensor))  # fmt: skip


def is_alone(tensor: torch.Tensor) -> bool:
    """No other tensor has its memory. Of a PyTorch that does not tell: False."""
    if not hasattr(torch._C, "_storage_Use_Count"):
        return False
    return _uses(tensor) == _uses(torch.empty(1))


def _uses(tensor: torch.Tensor) -> int:
    storage = tensor.untyped_storage()
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count
