"""Indices that point outside, found before the operator runs.

A trial run on a slice may hand an operator indices of the whole sequence: that is how order and counts of tokens show
themselves. On CPU this raises and the trial is over; on CUDA it is a device-side assertion, after which the process
cannot use the device any more. So whatever indexes is checked first, which waits for the device: in trials only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from memo_runtime.blocks.operators import base_name, full_name

Arguments = Mapping[str, Any]


def check_bounds(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise where a call of ``func`` would read or write outside of its tensors.

    Raises:
        IndexError: it would; nothing was run.
    """
    name = base_name(full_name(func).replace("::", "."))
    rule = _RULES.get(name.removesuffix("_"))
    schema = getattr(func, "_schema", None)
    if rule is None or schema is None:
        return
    names = [argument.name for argument in schema.arguments]
    rule(name, {**dict(zip(names, args, strict=False)), **kwargs})


def _refuse_outside(name: str, indices: Any, size: int, *, lowest: int = 0) -> None:
    if not isinstance(indices, torch.Tensor) or not indices.numel() or indices.is_meta:
        return  # none, or values that nobody knows
    low, high = (int(value) for value in torch.aminmax(indices))
    if low < lowest or high >= size:
        raise IndexError(f"{name} asks for index {high if high >= size else low} where there are {size}")


def _by_lists(name: str, call: Arguments) -> None:
    """``x[i, mask, None, j]``: one entry per dimension, a mask takes as many as it has."""
    dim = 0
    for index in call["indices"]:
        if index is None:
            dim += 1
        elif index.dtype in (torch.bool, torch.uint8):
            dim += index.dim()
        else:
            size = call["self"].shape[dim]
            _refuse_outside(name, index, size, lowest=-size)
            dim += 1


def _along(name: str, call: Arguments) -> None:
    tensor = call["self"]
    _refuse_outside(name, call["index"], tensor.shape[call["dim"]] if tensor.dim() else 1)


def _flat(name: str, call: Arguments) -> None:
    size = call["self"].numel()
    _refuse_outside(name, call["index"], size, lowest=-size)


def _rows(name: str, call: Arguments) -> None:
    _refuse_outside(name, call["indices"], call["weight"].shape[0])


def _classes(name: str, call: Arguments) -> None:
    target, classes = call["target"], call["self"].shape[1 if call["self"].dim() > 1 else 0]
    _refuse_outside(name, target[target != call.get("ignore_index", -100)], classes)


def _groups(name: str, call: Arguments) -> None:
    """Products of groups of rows, by where each group ends; counts of another length end beyond the last row."""
    left, right = list(call.values())[:2]
    cut = left.shape[1] if left.dim() == 2 else right.shape[1]
    rows = left.shape[0] if right.dim() == 3 else cut
    _refuse_outside(name, call.get("offs"), rows + 1)


_RULES: dict[str, Callable[[str, Arguments], None]] = {
    **dict.fromkeys(("index", "_unsafe_index", "index_put", "_unsafe_index_put", "_index_put_impl"), _by_lists),
    **dict.fromkeys(("index_select", "index_add", "index_copy", "index_fill", "index_reduce", "gather"), _along),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), _along),
    **dict.fromkeys(("take", "put"), _flat),
    **dict.fromkeys(("embedding",), _rows),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), _classes),
    **dict.fromkeys(("_grouped_mm", "_scaled_grouped_mm", "grouped_mm_fallback"), _groups),
}
