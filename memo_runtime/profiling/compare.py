"""Comparing a tensor of a run on the whole sequence with its counterpart of a run on a token slice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from memo_runtime.blocks.region import take
from memo_runtime.blocks.rerun import storage_key
from memo_runtime.records import TokenAxis

#: Relative L2 difference that rounding may explain: a matrix product on fewer rows may sum in another order.
_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4}
_COARSE = 3e-2


@dataclass(frozen=True, slots=True)
class Lengths:
    """A run on tokens [0, whole) against one on tokens [start, whole).

    ``before`` and ``after`` are the input's other dimensions, in front of its tokens and behind them.
    """

    whole: int
    start: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def batch(self) -> int:
        """What precedes the tokens, in one number."""
        return math.prod(self.before)

    @property
    def part(self) -> int:
        """Tokens of the slice."""
        return self.whole - self.start

    def is_own(self, axis: TokenAxis) -> bool:
        """Tokens along ``axis`` lie as the input's do: between dimensions next to them there, some or none of each."""
        outers = {math.prod(self.before[first:]) for first in range(len(self.before) + 1)}
        inners = {math.prod(self.after[:count]) for count in range(len(self.after) + 1)}
        return axis.outer in outers and axis.inner in inners


@dataclass(frozen=True, slots=True)
class Match:
    """How two tensors relate: ``dims`` grow with tokens; ``axis`` if there is one; ``equal`` values.

    ``padded``: the one dimension that grows holds the tokens rounded up to this multiple (a log-sum-exp).
    """

    dims: tuple[int, ...]
    axis: TokenAxis | None
    equal: bool
    comparable: bool = True
    padded: int | None = None


@torch.no_grad()
def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the rounding of their dtype; exactly for integers and booleans."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # Weights are compared with themselves in every run, and reading them takes longer than all else.
    if _is_same_memory(a, b) or torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    wide = torch.complex128 if a.is_complex() else torch.float64
    x, y = torch.nan_to_num(a.to(wide)), torch.nan_to_num(b.to(wide))
    # Infinities of masks become the largest number; clamp so that their squares stay finite.
    if not a.is_complex():
        x, y = x.clamp(-1e100, 1e100), y.clamp(-1e100, 1e100)
    scale = torch.linalg.vector_norm(y).item()
    return bool(torch.linalg.vector_norm(x - y).item() <= _TOLERANCE.get(a.dtype, _COARSE) * max(scale, 1e-30))


def _is_same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Of tensors with the same shape and dtype: they are the same elements. Subclasses that wrap others are asked."""
    if a is b:
        return True
    if hasattr(a, "__tensor_flatten__") or hasattr(b, "__tensor_flatten__"):
        return False
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return a.layout == b.layout and storage_key(a) == storage_key(b)
    return (
        storage_key(a) == storage_key(b) and a.storage_offset() == b.storage_offset() and a.stride() == b.stride()
    )


def growing_dims(whole: torch.Size, part: torch.Size) -> tuple[int, ...] | None:
    """Dimensions whose sizes differ; None if the shapes have nothing to do with each other."""
    if len(whole) != len(part):
        return None
    return tuple(dim for dim, (n, m) in enumerate(zip(whole, part, strict=True)) if n != m)


def _splits(size: int, part_size: int, lengths: Lengths) -> Iterator[tuple[int, int]]:
    """(outer, inner) with size == outer * tokens * inner, the likeliest first: the batch in front."""
    if size % lengths.whole or part_size % lengths.part or size // lengths.whole != part_size // lengths.part:
        return
    factor = size // lengths.whole
    outers = [d for d in range(1, factor + 1) if factor % d == 0]
    preferred = [d for d in (lengths.batch, factor, 1) if d in outers]
    for outer in dict.fromkeys(preferred + outers):
        yield outer, factor // outer


def splits(whole: torch.Size, part: torch.Size, dim: int, lengths: Lengths) -> Iterator[TokenAxis]:
    """Where tokens may be in dimension ``dim``, by its size with all of them and on the slice; the likeliest first."""
    for outer, inner in _splits(whole[dim], part[dim], lengths):
        yield TokenAxis(dim=dim, outer=outer, inner=inner)


def match(whole: torch.Tensor, part: torch.Tensor, lengths: Lengths) -> Match:
    """Relate ``whole`` and ``part``; of several token axes the first with equal values is taken."""
    dims = growing_dims(whole.shape, part.shape)
    if dims is None or whole.dtype != part.dtype:
        return Match((), None, equal=False, comparable=False)
    if not dims:
        return Match((), None, equal=close(part, whole))
    if len(dims) > 1:
        return Match(dims, None, equal=_equal_corner(whole, part, dims, lengths))
    dim = dims[0]
    first: TokenAxis | None = None
    for axis in splits(whole.shape, part.shape, dim, lengths):
        first = first or axis
        if close(part, take(whole, axis, lengths.whole, lengths.start, lengths.whole)):
            return Match(dims, axis, equal=True)
    padded = _padding(whole.shape[dim], part.shape[dim], lengths) if first is None else None
    return Match(dims, first, equal=False, comparable=first is not None, padded=padded)


def tokens_hidden(whole: torch.Tensor, part: torch.Tensor, lengths: Lengths, axis: TokenAxis | None) -> bool:
    """One dimension holds tokens and heads, or the like, and values are as equal another way as by ``axis`` (zeros).

    What lies in the order of the input, such as sequences times tokens, is what it seems.
    """
    if axis is None or lengths.is_own(axis) or not whole.numel() or not whole.stride(axis.dim):
        return False
    axes = splits(whole.shape, part.shape, axis.dim, lengths)
    tails = (take(whole, one, lengths.whole, lengths.start, lengths.whole) for one in axes)
    return sum(close(part, one) for one in tails) > 1


def _padding(size: int, part_size: int, lengths: Lengths) -> int | None:
    for multiple in (8, 16, 32, 64, 128):
        rounded = (-(-n // multiple) * multiple for n in (lengths.whole, lengths.part))
        if (size, part_size) == tuple(rounded):
            return multiple
    return None


def _equal_corner(whole: torch.Tensor, part: torch.Tensor, dims: tuple[int, ...], lengths: Lengths) -> bool:
    corner = whole
    for dim in dims:
        if whole.shape[dim] != lengths.whole or part.shape[dim] != lengths.part:
            return False
        corner = corner.narrow(dim, lengths.start, lengths.part)
    return close(part, corner)
