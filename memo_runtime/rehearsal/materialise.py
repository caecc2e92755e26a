"""A model made on the meta device, and its short batch, as something that can be rehearsed on a real one.

What a rehearsal shows does not depend on values, as long as they are finite: parameters are small random numbers,
buffers (rotary frequencies, tables of positions) and token ids are zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from memo_runtime.errors import RehearsalError

_DEVIATION = 0.02


def materialised(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` in place, with memory on ``device``; what was one tensor stays one, such as a tied head."""
    made: dict[int, torch.Tensor] = {}

    def real(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            data = torch.empty_like(tensor, device=device).zero_()
            if isinstance(tensor, nn.Parameter):
                filled = data.normal_(std=_DEVIATION) if data.is_floating_point() else data
                data = nn.Parameter(filled, requires_grad=tensor.requires_grad)
            made[id(tensor)] = data
        return made[id(tensor)]

    with torch.no_grad():
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
            for held in tables:
                for name, value in list(held.items()):
                    if isinstance(value, torch.Tensor):
                        held[name] = real(value)
    return model


def lengthened(batch: Any, tokens: int, device: torch.device) -> Any:
    """``batch`` of one row of token ids, labels and masks, with ``tokens`` of them, on ``device``.

    Raises:
        RehearsalError: a tensor with tokens in another place, or of numbers that are none.
    """

    def longer(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.dim() != 2 or leaf.is_floating_point():
            raise RehearsalError(
                f"a batch with a tensor of shape {list(leaf.shape)} ({leaf.dtype}) cannot be made longer without "
                "knowing where its tokens are: call memo.rehearse(model, batch) with a batch of that length"
            )
        return torch.zeros(leaf.shape[0], tokens, dtype=leaf.dtype, device=device)

    return _pytree.tree_map(longer, batch)
