"""Rows of tensors in memory: tiles cut out of a whole one, and written into it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from memo_runtime.capture.axes import rows
from memo_runtime.records import TokenAxis


def packed(whole: torch.Tensor, axis: TokenAxis, tokens: int, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) without gaps, in the memory order of ``whole``; a view of it wherever that is possible.

    Dimensions of size one get the strides that they would have without gaps, so that tiles of all lengths look alike.
    """
    if axis.outer == 1 and axis.inner == 1:
        part = _dense_rows(whole, axis.dim, start, stop)
        return part if part is not None else without_gaps(whole.narrow(axis.dim, start, stop - start))
    part = rows(whole, axis, tokens, start, stop)
    return without_gaps(part.flatten(axis.dim, axis.dim + 2))


def _dense_rows(whole: torch.Tensor, dim: int, start: int, stop: int) -> torch.Tensor | None:
    """Rows [start, stop) of dimension ``dim`` where they lie together in memory, in one operator; None: they do not."""
    shape, strides, ahead, there = _place_of_rows(whole.shape, whole.stride(), dim, start, stop)
    return whole.as_strided(shape, strides, whole.storage_offset() + ahead) if there else None


@lru_cache(maxsize=1 << 12)
def _place_of_rows(
    shape: tuple[int, ...], strides: tuple[int, ...], dim: int, start: int, stop: int
) -> tuple[tuple[int, ...], tuple[int, ...], int, bool]:
    """(shape, strides without gaps, elements ahead, whether the rows lie so already)."""
    if not 0 <= start <= stop <= shape[dim]:
        raise IndexError(f"rows {start} to {stop} of {shape[dim]}")
    cut = (*shape[:dim], stop - start, *shape[dim + 1 :])
    found, there = _without_gaps(cut, strides)
    return cut, found, start * strides[dim], there


def without_gaps(part: torch.Tensor) -> torch.Tensor:
    """``part`` itself where its elements lie together in memory, else a copy in the same order of dimensions."""
    strides, there = _without_gaps(part.shape, part.stride())
    if there:
        return part.as_strided(part.shape, strides)
    return torch.empty_strided(part.shape, strides, dtype=part.dtype, device=part.device).copy_(part)


def gapless_rows(whole: torch.Tensor, axis: TokenAxis, start: int, stop: int) -> torch.Tensor | None:
    """Rows [start, stop) of ``whole``, to be written to, where they lie together in memory; None: they do not."""
    if axis.outer != 1:
        return None
    return _dense_rows(whole, axis.dim, start * axis.inner, stop * axis.inner)


def lies_by_token(strides: Sequence[int]) -> bool:
    """A value ``[B, H, T, D]`` lies in memory as ``[B, T, H, D]``: all heads of a token together."""
    return len(strides) == 4 and strides[0] >= strides[2] >= strides[1] >= strides[3]


def empty_by_token(shape: Sequence[int], alike: torch.Tensor) -> torch.Tensor:
    """Such a value of the type and device of ``alike``."""
    batch, heads, tokens, depth = shape
    return torch.empty((batch, tokens, heads, depth), dtype=alike.dtype, device=alike.device).transpose(1, 2)


def gapless_like(layout: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Memory without gaps, its dimensions in the order of ``layout``."""
    strides, _ = _without_gaps(layout.shape, layout.stride())
    return torch.empty_strided(layout.shape, strides, dtype=layout.dtype, device=device)


def gapless_place(tensor: torch.Tensor, layout: torch.Tensor) -> tuple[int, ...] | None:
    """The strides of ``gapless_like`` where ``tensor`` lies so already; None: it does not.

    Those of dimensions of size one count: operators order what they yield by them too.
    """
    strides, _ = _without_gaps(layout.shape, layout.stride())
    return strides if _alike(tensor.shape, tensor.stride(), strides) else None


@lru_cache(maxsize=1 << 12)
def _without_gaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    """(strides without gaps in the same memory order, whether these lie so already); blocks ask often."""
    found = tuple(_gapless(shape, _steps(shape, strides)))
    return found, _alike(shape, strides, found)


def _gapless(shape: Sequence[int], steps: Sequence[int]) -> list[int]:
    """Strides without gaps in the order of ``steps``.

    Dimensions of size one lie outside of all others, but those at the end inside: kernels want a last stride of one.
    """
    last = max((dim for dim, size in enumerate(shape) if size != 1), default=-1)

    def place(dim: int) -> tuple[int, int, int]:
        one = shape[dim] == 1
        return (2 * (dim > last) if one else 1, 0 if one else -steps[dim], dim)

    return _strides(shape, sorted(range(len(shape)), key=place))


def _alike(shape: Sequence[int], one: Sequence[int], other: Sequence[int]) -> bool:
    """Strides are the same wherever they matter."""
    return all(size == 1 or a == b for size, a, b in zip(shape, one, other, strict=True))


def _steps(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """``strides``, of expanded dimensions what they would be outside of those behind them.

    As the innermost ones, where a stride of 0 would put them, features of a head would lie apart: kernels of attention
    take that for granted, and yield something else.
    """
    steps = [int(stride) for stride in strides]
    for dim in reversed(range(len(shape))):
        if steps[dim] == 0 and shape[dim] != 1:
            steps[dim] = max((steps[inner] * shape[inner] for inner in range(dim + 1, len(shape))), default=1)
    return steps


def same_memory(tensor: torch.Tensor, layout: torch.Tensor) -> bool:
    """Both have the same strides wherever strides matter."""
    strides, others = tensor.stride(), layout.stride()
    return strides == others or _alike(tensor.shape, strides, others)


def like(
    tile: torch.Tensor, axis: TokenAxis, tokens: int, length: int, device: torch.device | None = None
) -> torch.Tensor:
    """Full-length memory for an output, its dimensions in the memory order of its first tile."""
    shape, strides = _longer(tile.shape, tile.stride(), axis.dim, tokens, length)
    # No view: autograd refuses in-place operations on a result that is one.
    return torch.empty_strided(shape, strides, dtype=tile.dtype, device=device or tile.device)


@lru_cache(maxsize=1 << 12)
def _longer(
    shape: tuple[int, ...], strides: tuple[int, ...], dim: int, tokens: int, length: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, strides) of ``tokens`` where those given are of ``length``."""
    whole = [*shape]
    whole[dim] = whole[dim] // length * tokens
    steps = _steps(shape, strides)
    order = sorted(range(len(whole)), key=lambda at: (-steps[at], at))
    return tuple(whole), tuple(_strides(whole, order))


def _strides(shape: Sequence[int], order: Sequence[int]) -> list[int]:
    """Those of memory without gaps whose dimensions lie in ``order``, the outermost first."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim]
    return strides


def write(whole: torch.Tensor, axis: TokenAxis, tokens: int, start: int, tile: torch.Tensor) -> None:
    """Put ``tile`` into ``whole`` from row ``start`` on."""
    length = tile.shape[axis.dim] // (axis.outer * axis.inner)
    target = rows(whole, axis, tokens, start, start + length)
    target.copy_(tile.view(target.shape) if tile.is_contiguous() else tile.reshape(target.shape))


def is_dense(tensor: torch.Tensor) -> bool:
    """Its elements fill one run of memory, each once, in some order of dimensions."""
    return _fills(tensor.shape, tensor.stride())


@lru_cache(maxsize=1 << 12)
def _fills(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in sorted(zip(shape, strides, strict=True), key=lambda pair: pair[1]):
        if size != 1 and step != expected:
            return False
        expected *= size
    return expected > 0
