"""What the arguments of the model take on the device during a step: their caller holds them to its end."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.utils import _pytree

from memo_runtime.blocks.call import BlockCall
from memo_runtime.sizes import Growth

#: Tokens of a mask come twice, those of anything else once.
_MOST_AXES = 2


def batch_bytes(batch: Any, lengths: Collection[int], calls: Iterable[BlockCall], *, width: int) -> Growth:
    """Bytes of the tensors of ``batch`` by tokens of a sequence.

    Args:
        batch: what the model is called with. lengths: tokens of its sequences, as blocks have seen them.
        calls: of blocks that are counted with their arguments, which may be tensors of the batch themselves.
        width: features of a token, which may be as many as there are tokens.
    """
    counted = {tensor.untyped_storage()._cdata for call in calls for _, tensor in call.tensors()}
    found = [0.0] * (_MOST_AXES + 1)
    for tensor in _pytree.tree_leaves(batch):
        if not isinstance(tensor, torch.Tensor) or tensor.untyped_storage()._cdata in counted:
            continue
        shape = tensor.shape
        if tensor.is_floating_point() and tensor.dim() > _MOST_AXES and shape[-1] == width:
            shape = shape[:-1]
        tokens = [size for size in shape if size and size in lengths][-_MOST_AXES:]
        share = float(tensor.numel() * tensor.element_size())
        for size in tokens:
            share /= size
        found[len(tokens)] += share
    constant, linear, quadratic = found
    return Growth(constant=constant, linear=linear, quadratic=quadratic)
