"""Which dimensions of a call's arguments are tokens, before anything is known of the block."""

from __future__ import annotations

import torch

from memo_runtime.blocks.call import BlockCall
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.records import ArgumentAxes


def token_dims(call: BlockCall) -> tuple[int, dict[int, tuple[int, ...]]]:
    """(number of tokens, leaf index -> token dimensions), by size.

    The tokens of the input, the first floating-point tensor, are in its last dimension but one; a dimension of
    another leaf of that size is one of tokens too. Where that guess is wrong the trace fails or is refused: what is
    captured is proved operator by operator.

    Raises:
        CaptureRefusedError: the call has no such tensor.
    """
    first = call.input_leaf
    if first is None:
        raise CaptureRefusedError("arguments", "none is a floating-point tensor with two dimensions")
    source: torch.Tensor = call.leaves[first]
    at = source.dim() - 2
    tokens = int(source.shape[at])
    found: dict[int, tuple[int, ...]] = {first: (at,)}
    for index, leaf in call.tensors():
        dims = tuple(dim for dim, size in enumerate(leaf.shape) if size == tokens)
        if index == first or not dims:
            continue
        is_mask = not leaf.is_floating_point() and (leaf.dim() == 3 or int(source.shape[0]) != tokens)
        if leaf.dim() < 4 and len(dims) > 1 and not is_mask:
            # A hidden size or a number of heads that happens to be the same: tokens come before features.
            at_right = [dim for dim in dims if dim - leaf.dim() == at - source.dim()]
            dims = tuple(at_right[:1]) or dims[:1]
        found[index] = dims
    return tokens, found


def shortened(call: BlockCall, length: int) -> BlockCall:
    """The first ``length`` tokens of ``call``, with memory and leaves of its own wherever it wants a gradient."""
    _, dims = token_dims(call)
    short = call.cut([ArgumentAxes(leaf=leaf, dims=where) for leaf, where in dims.items()], 0, length)
    return short.replaced(
        {index: leaf.detach().clone().requires_grad_() for index, leaf in short.tensors() if leaf.requires_grad}
    )
