"""Which dimensions of a call's arguments are tokens, before anything is known of the block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memo_runtime.blocks.call import BlockCall
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.records import ArgumentAxes


@dataclass(frozen=True, slots=True)
class Reading:
    """How the tokens of a call's arguments are found.

    Args:
        front: an input of three dimensions has them in the first (``batch_first=False``).
        square: of floating-point arguments with several dimensions of their number, all are tokens: a mask that is
            added to scores. Else one of them is, and the others have features that are as many by chance.
    """

    front: bool = False
    square: bool = False


USUAL = Reading()


def may_be_front(call: BlockCall) -> bool:
    """The input has a dimension before that of tokens, and no more than one, where they may be as well."""
    return call.input_leaf is not None and call.leaves[call.input_leaf].dim() == 3


def may_be_square(call: BlockCall, front: bool) -> bool:
    """Whether it makes a difference for ``call``."""
    return token_dims(call, Reading(front)) != token_dims(call, Reading(front, square=True))


def token_dims(call: BlockCall, reading: Reading = USUAL) -> tuple[int, dict[int, tuple[int, ...]]]:
    """(number of tokens, leaf index -> token dimensions), by size.

    The tokens of the input, the first floating-point tensor, are in its last dimension but one, or where ``reading``
    says; a dimension of another leaf of that size is one of tokens too. Where that guess is wrong the trace fails or is
    refused: what is captured is proved operator by operator.

    Raises:
        CaptureRefusedError: the call has no such tensor, or it is nested.
    """
    first = call.input_leaf
    if first is None:
        raise CaptureRefusedError("arguments", "none is a floating-point tensor with two dimensions")
    source: torch.Tensor = call.leaves[first]
    if source.is_nested:
        raise CaptureRefusedError("arguments", "its input is a nested tensor: sequences have lengths of their own")
    front = reading.front and source.dim() == 3
    at = 0 if front else source.dim() - 2
    tokens = int(source.shape[at])
    found: dict[int, tuple[int, ...]] = {first: (at,)}
    for index, leaf in call.tensors():
        dims = tuple(dim for dim, size in enumerate(leaf.shape) if size == tokens)
        if index == first or not dims:
            continue
        is_mask = leaf.dim() == 3 or int(source.shape[1 if front else 0]) != tokens
        is_mask = is_mask and (reading.square or not leaf.is_floating_point())
        if leaf.dim() < 4 and len(dims) > 1 and not is_mask:
            # A hidden size or a number of heads that happens to be the same: tokens come before features.
            at_right = [dim for dim in dims if dim - leaf.dim() == at - source.dim()]
            dims = tuple(at_right[:1]) or dims[:1]
        found[index] = dims
    return tokens, found


def shortened(call: BlockCall, length: int, reading: Reading = USUAL) -> BlockCall:
    """The first ``length`` tokens of ``call``, with memory and leaves of its own wherever it wants a gradient."""
    _, dims = token_dims(call, reading)
    short = call.cut([ArgumentAxes(leaf=leaf, dims=where) for leaf, where in dims.items()], 0, length)
    return short.replaced(
        {index: leaf.detach().clone().requires_grad_() for index, leaf in short.tensors() if leaf.requires_grad}
    )
