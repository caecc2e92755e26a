"""Where the bytes of saved tensors lie, and how to cut them along tokens.

Saved tensors are views: attention saves q as [B, H, S, D] over memory laid out [B, S, H, D], the output
projection saves the attention output as [B*S, H*D] over the same storage that attention saved, and so on. A
``Region`` describes one piece of storage in the only form that copies need,

    outer x tokens x inner     (elements; inner is the distance between two tokens)

so that a token prefix is ``outer`` runs of ``prefix * inner`` elements (one run where outer is 1), together with
the views that autograd wants back. Restored views have the sizes, strides and relative offsets of the originals,
hence the kernels of backward see what they would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from memo_runtime.records import TokenAxis


@dataclass(frozen=True, slots=True)
class View:
    """A strided view relative to the start of a region; ``axis`` is where its tokens are.

    ``spread``: the strides of the original, where it had gaps in memory and the region holds it packed.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    axis: TokenAxis | None
    spread: tuple[int, ...] | None = None

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The view over ``flat``, a 1-D tensor that holds the region."""
        return flat.as_strided(self.size, self.stride, flat.storage_offset() + self.offset)

    def as_it_was(self, flat: torch.Tensor) -> torch.Tensor:
        """The view with the strides of the original; a copy where those had gaps."""
        packed_view = self.of(flat)
        if self.spread is None:
            return packed_view
        return laid_out(packed_view, self.spread)

    @property
    def original_stride(self) -> tuple[int, ...]:
        """The strides of the tensor that it stands for."""
        return self.stride if self.spread is None else self.spread


@dataclass(frozen=True, slots=True)
class Region:
    """``outer * tokens * inner`` elements, and the views over them."""

    outer: int
    tokens: int
    inner: int
    views: tuple[View, ...]

    @property
    def numel(self) -> int:
        """Elements of the whole region."""
        return self.outer * self.tokens * self.inner

    def rows(self, flat: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Tokens [start, stop) of ``flat`` as [outer, stop - start, inner]."""
        return flat.view(self.outer, self.tokens, self.inner)[:, start:stop]

    def cut(self, start: int, stop: int) -> Region:
        """The region of tokens [start, stop) alone, packed."""
        length = stop - start
        return Region(self.outer, length, self.inner, tuple(self._cut_view(v, length) for v in self.views))

    def _cut_view(self, view: View, length: int) -> View:
        assert view.axis is not None, "only regions with a token axis are cut"
        block, new_block = self.tokens * self.inner, length * self.inner
        size, stride = list(view.size), list(view.stride)
        size[view.axis.dim] = view.axis.outer * length * view.axis.inner
        for dim, step in enumerate(stride):
            if dim != view.axis.dim and step >= block:
                stride[dim] = step // block * new_block
        outer_steps, within = divmod(view.offset, block)
        spread = view.spread
        if spread is not None:
            spread = resized(view.size, spread, view.axis.dim, size[view.axis.dim])
        return View(tuple(size), tuple(stride), outer_steps * new_block + within, view.axis, spread)


def take(tensor: torch.Tensor, axis: TokenAxis, tokens: int, start: int, stop: int) -> torch.Tensor:
    """Tokens [start, stop) of ``tensor`` along ``axis``; a view wherever strides allow one."""
    if axis.outer == 1 and axis.inner == 1:
        return tensor.narrow(axis.dim, start, stop - start)
    split: torch.Tensor = tensor.unflatten(axis.dim, (axis.outer, tokens, axis.inner))
    return split.narrow(axis.dim + 1, start, stop - start).flatten(axis.dim, axis.dim + 2)


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` without gaps in memory, its dimensions in the same memory order; itself where it has none."""
    return tensor if is_packed(tensor.shape, tensor.stride()) else tensor.clone(memory_format=torch.preserve_format)


def is_packed(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """A tensor of these has no gaps in memory, and one place for each of its elements."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def resized(shape: Sequence[int], strides: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    """The strides that a tensor of these would have been made with if it had ``size`` along ``dim``.

    Dimensions that are expanded stay so, and two between which memory has a gap, so that no view can join them, have
    one still. What a forward saves, and in which order, depends on both (``linear`` copies an input that it cannot view
    as a matrix, and saves its weight first then).
    """
    if 0 in shape:
        return tuple(strides)  # without elements any are as good
    found = list(strides)
    before = after = 1  # elements that the dimensions inside take
    for stride, at in sorted((stride, at) for at, stride in enumerate(strides)):
        if stride == 0 or (shape[at] == 1 and at != dim):
            continue
        times, gap = divmod(stride, before)
        if not times:
            return tuple(strides)  # overlapping windows
        found[at] = times * after + gap
        before, after = stride * shape[at], found[at] * (size if at == dim else shape[at])
    return tuple(found)


def laid_out(tensor: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """``tensor`` with these strides; itself where it has them."""
    if has_strides(tensor, strides):
        return tensor
    wide = tensor.new_empty_strided(tensor.shape, tuple(strides))
    shrink(wide).copy_(_first_along(tensor, strides))
    return wide


def has_strides(tensor: torch.Tensor, strides: Sequence[int]) -> bool:
    """``tensor`` has these strides, wherever it has more than one element along them."""
    own = tensor.stride()
    return own == strides or all(a == b or n <= 1 for a, b, n in zip(own, strides, tensor.shape, strict=True))


def as_made(part: torch.Tensor, shape: Sequence[int], strides: Sequence[int], dim: int) -> torch.Tensor:
    """``part``, cut along ``dim`` out of a tensor of ``shape`` and ``strides``, in memory as if it were a whole one."""
    if is_packed(shape, strides):
        return packed(part)
    return laid_out(part, resized(shape, strides, dim, part.shape[dim]))


def copied_as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, no leaf of a graph, so that a block may write into it."""
    if tensor.layout is not torch.strided or tensor.is_nested or hasattr(tensor, "__tensor_flatten__"):
        return tensor.clone()
    small = shrink(tensor.detach())
    if is_packed(small.shape, small.stride()):
        made = small.requires_grad_(tensor.requires_grad).clone()
        return made if small.shape == tensor.shape else made.expand(tensor.shape)
    flat = tensor.detach().new_empty(_last_element((tuple(tensor.shape), tensor.stride(), 0)) + 1)
    shrink(flat.as_strided(tensor.shape, tensor.stride())).copy_(small)
    return flat.requires_grad_(tensor.requires_grad).clone().as_strided(tensor.shape, tensor.stride())


def tail(
    tensor: torch.Tensor,
    axis: TokenAxis | None,
    dims: tuple[int, ...],
    *,
    tokens: int,
    start: int,
    strides: Sequence[int] | None = None,
) -> torch.Tensor:
    """Tokens [start, tokens) of ``tensor`` along its axis, as made, or along both of its token dimensions.

    ``strides``: those that it was made with, where it has others now.
    """
    if not start:
        return tensor
    if axis is not None:
        part = take(tensor, axis, tokens, start, tokens)
        return as_made(part, tensor.shape, tensor.stride() if strides is None else strides, axis.dim)
    for dim in dims:
        tensor = tensor.narrow(dim, start, tokens - start)
    return tensor


def shrink(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with expanded dimensions (stride 0) cut to one element."""
    return _first_along(tensor, tensor.stride())


def _first_along(tensor: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """The first element of ``tensor`` along each dimension of stride 0."""
    for dim, stride in enumerate(strides):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


#: Shape, strides and offset of a tensor over its storage, in elements.
_Lies = tuple[tuple[int, ...], tuple[int, ...], int]


def _span(tensors: Sequence[_Lies]) -> tuple[int, int]:
    """Half-open range of storage elements that ``tensors`` (of one storage) touch."""
    return min(offset for _, _, offset in tensors), max(_last_element(one) + 1 for one in tensors)


def _last_element(tensor: _Lies) -> int:
    shape, strides, offset = tensor
    return offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))


def _shrunk(tensor: _Lies) -> _Lies:
    """As ``shrink`` makes it."""
    shape, strides, offset = tensor
    sizes = tuple(1 if step == 0 and size > 1 else size for size, step in zip(shape, strides, strict=True))
    return sizes, strides, offset


def _layout(tensor: _Lies) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Two views with the same layout hold the same elements."""
    shape, strides, offset = tensor
    dims = sorted((s, n) for n, s in zip(shape, strides, strict=True) if n > 1)
    merged: list[tuple[int, int]] = []
    for step, size in dims:
        if merged and merged[-1][0] * merged[-1][1] == step:
            merged[-1] = (merged[-1][0], merged[-1][1] * size)
        else:
            merged.append((step, size))
    return offset, tuple(merged)


def _token_stride(tensor: _Lies, axis: TokenAxis, tokens: int) -> int | None:
    """Elements between two tokens; None where other dimensions do not nest around it, or one element stands for all."""
    shape, strides, _ = tensor
    inner = strides[axis.dim] * axis.inner
    if inner <= 0:
        return None
    block = tokens * inner
    for dim, (size, step) in enumerate(zip(shape, strides, strict=True)):
        if size <= 1 or step == 0 or dim == axis.dim:
            continue
        if step >= block:
            if step % block:
                return None
        elif step * (size - 1) >= inner:
            return None
    return inner


def dense_region(tensors: Sequence[torch.Tensor], axes: Sequence[TokenAxis | None], tokens: int) -> Region | None:
    """The region that ``tensors``, all over one storage and of one dtype, share; None if they leave gaps.

    ``axes`` gives each tensor's token axis, all None for bytes that are never split. ``tokens`` is the length.
    """
    lie = tuple([(tuple(one.shape), one.stride(), int(one.storage_offset())) for one in tensors])
    return _region_of(lie, tuple(axes), tokens)


@lru_cache(maxsize=1 << 13)
def _region_of(tensors: tuple[_Lies, ...], axes: tuple[TokenAxis | None, ...], tokens: int) -> Region | None:
    """The same of how they lie, which is so at every step."""
    start, stop = _span(tensors)
    shrunk = {_layout(one): math.prod(one[0]) for one in map(_shrunk, tensors)}
    if sum(shrunk.values()) < stop - start:
        return None
    if any(axis is None for axis in axes):
        outer, length, inner = 1, 1, stop - start
    else:
        steps = {_token_stride(t, axis, tokens) for t, axis in zip(tensors, axes, strict=True) if axis is not None}
        step = steps.pop()
        if steps or step is None or (stop - start) % (tokens * step):
            return None
        outer, length, inner = (stop - start) // (tokens * step), tokens, step
    views = tuple(
        View(shape, strides, offset - start, axis)
        for (shape, strides, offset), axis in zip(tensors, axes, strict=True)
    )
    return Region(outer, length, inner, views)


def compact_region(tensor: torch.Tensor, axis: TokenAxis | None, tokens: int) -> tuple[Region, torch.Tensor]:
    """(region, packed copy) of one tensor whose memory has gaps; expanded dimensions stay expanded.

    Not the one along which it is to be cut: there the copy has every element. It has its dimensions in the same memory
    order wherever tokens can be cut in it: kernels of backward choose by strides.
    """
    strides = [step if axis is None or dim != axis.dim else 1 for dim, step in enumerate(tensor.stride())]
    small = _first_along(tensor, strides)
    dense = packed(small)
    region = dense_region([dense], [axis], tokens)
    if region is None:
        dense = small.clone(memory_format=torch.contiguous_format)
        region = dense_region([dense], [axis], tokens)
    assert region is not None, "a contiguous tensor can be cut along any dimension"
    (view,) = region.views
    expanded = (n != m for n, m in zip(tensor.shape, small.shape, strict=True))
    stride = tuple(0 if wide else step for wide, step in zip(expanded, view.stride, strict=True))
    view = View(tuple(tensor.shape), stride, view.offset, axis, spread=tensor.stride())
    return Region(region.outer, region.tokens, region.inner, (view,)), flat_of(dense, region)


def flat_of(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """The region's elements as a 1-D view, given the tensor of its first view."""
    start = tensor.storage_offset() - region.views[0].offset
    return tensor.as_strided((region.numel,), (1,), start)
