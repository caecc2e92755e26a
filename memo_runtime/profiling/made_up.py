"""Numbers that tell tokens apart, to ask an operator with in the place of its own.

A first batch may be the same for all tokens, and a part that begins at zero gives zeros: an operator that orders tokens
anew then gives what it was given, and nothing shows that it mixes. On numbers of which no two are alike it shows.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import cache
from typing import Any

import torch

from memo_runtime.blocks.region import tail
from memo_runtime.profiling.compare import Lengths, growing_dims, match, splits
from memo_runtime.records import TokenAxis

#: Numbers in all, over and over: a prime, so that they start anew at another place of every token.
_COUNT = 8191
#: Inputs of one operator are no copies of each other.
_STEP = 1237
#: Inside of what logarithms, roots, inverse sines and probabilities take.
_LOWEST, _HIGHEST = 0.1, 0.9
#: Elements of a tensor that are made anew: memory for a copy of more may not be there.
_MOST_ELEMENTS = 2**26
#: Ways to split one dimension into sequences, tokens and heads that are tried.
_MOST_WAYS = 6


@cache
def _numbers() -> torch.Tensor:
    """Drawn from a generator of their own."""
    drawn = torch.rand(_COUNT, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    return drawn * (_HIGHEST - _LOWEST) + _LOWEST


def made_up(tensor: torch.Tensor, number: int) -> torch.Tensor:
    """Other numbers in the shape, dtype and strides of ``tensor``, input ``number`` of an operator.

    What holds no real or complex numbers is kept: integers and masks say where, and numbers of others would be outside.
    """
    if not _is_replaced(tensor):
        return tensor
    shape, strides = tensor.shape, tensor.stride()
    count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    numbers = _numbers().roll(-number * _STEP)
    if tensor.is_complex():
        numbers = torch.complex(numbers, numbers.flip(0))
    numbers = numbers.to(tensor.device, tensor.dtype)
    return numbers.repeat(-(-count // _COUNT)).as_strided(shape, strides)


def form(full: Sequence[Any], others: Sequence[Any], lengths: Lengths) -> Hashable:
    """What made-up arguments depend on; None: on values that are kept as well.

    An operator of PyTorch's gives the same answer for the same form, in any block of any model.
    """
    if not all(_is_replaced(leaf) for leaf in (*full, *others) if isinstance(leaf, torch.Tensor)):
        return None
    found = (lengths.whole, lengths.start, lengths.batch, *(_form_of(leaf) for leaf in (*full, *others)))
    try:
        hash(found)
    except TypeError:
        return None
    return found


def _form_of(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), leaf


def _is_replaced(tensor: torch.Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    return tensor.layout == torch.strided and 0 < tensor.numel() <= _MOST_ELEMENTS


def ways_to_ask(
    full: Sequence[Any], others: Sequence[Any], lengths: Lengths, *, tokens_only: bool
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Arguments of an operator in made-up numbers, and those of its slice: their tails, in the shapes of ``others``.

    Sizes alone do not tell a dimension of sequences times tokens from one of tokens times heads, and values that are
    the same for all tokens do not either: the ways are yielded in turn. ``tokens_only``: what has no tokens, such as
    a weight, keeps its values.
    """
    made: list[Any] = []
    axes: list[list[TokenAxis]] = []
    for number, (leaf, other) in enumerate(zip(full, others, strict=True)):
        tensors = isinstance(leaf, torch.Tensor) and isinstance(other, torch.Tensor)
        kept = not tensors or (tokens_only and leaf.shape == other.shape)
        made.append(leaf if kept else made_up(leaf, number))
        axes.append(_axes(leaf, other, lengths) if tensors else [])
    for outer in list(dict.fromkeys(axis.outer for each in axes for axis in each))[:_MOST_WAYS] or [1]:
        chosen = [next((axis for axis in each if axis.outer == outer), each[0] if each else None) for each in axes]
        cut = [
            _tail(leaf, other, axis, lengths) if isinstance(leaf, torch.Tensor) else other
            for leaf, other, axis in zip(made, others, chosen, strict=True)
        ]
        if all(a.shape == b.shape for a, b in zip(cut, others, strict=True) if isinstance(b, torch.Tensor)):
            yield made, cut


def _axes(leaf: torch.Tensor, other: torch.Tensor, lengths: Lengths) -> list[TokenAxis]:
    """Where the tokens of ``leaf`` may be, if it has one dimension of them; by its values where these are kept."""
    dims = growing_dims(leaf.shape, other.shape) or ()
    if len(dims) != 1:
        return []
    if not _is_replaced(leaf):
        found = match(leaf, other, lengths).axis
        return [found] if found is not None else []
    return list(splits(leaf.shape, other.shape, dims[0], lengths))


def _tail(leaf: torch.Tensor, other: Any, axis: TokenAxis | None, lengths: Lengths) -> torch.Tensor:
    dims = growing_dims(leaf.shape, other.shape) if isinstance(other, torch.Tensor) else None
    if not dims or (len(dims) == 1 and axis is None):
        return leaf
    return tail(leaf, axis, dims, tokens=lengths.whole, start=lengths.start)
