"""``merging.py`` as one kernel of a GPU: imported only where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Rows of one program: 32 of 128 numbers keep a few loads of each thread in flight.
_ROWS = 32
#: (result, log-sum-exp) of one part: [B, H, S, D] and [B, H, S].
Both = tuple[torch.Tensor, torch.Tensor]


@triton.jit
def _rows_of(lse: tl.tensor, strides: tl.tuple, where: tl.tuple) -> tl.tensor:
    batch, head, row = where
    return lse + batch * strides[0] + head * strides[1] + row * strides[2]


@triton.jit
def _elements_of(output: tl.tensor, strides: tl.tuple, where: tl.tuple, column: tl.tensor) -> tl.tensor:
    batch, head, row = where
    return output + batch * strides[0] + head * strides[1] + row[:, None] * strides[2] + column[None, :] * strides[3]


@triton.jit
def _merge(own: tl.tuple, before: tl.tuple, place: tl.tuple, sizes: tl.tuple, block: tl.constexpr) -> None:
    """One block of rows. A part: result, log-sum-exp, strides of both. ``sizes``: heads, rows, size of a head."""
    heads, rows, depth = sizes
    # A tensor may have more elements than 32 bits count.
    row = tl.program_id(0).to(tl.int64) * block[0] + tl.arange(0, block[0])
    where = ((tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64), row)
    column = tl.arange(0, block[1]).to(tl.int64)
    there = row < rows
    mine = tl.load(_rows_of(own[1], own[3], where), there, 0.0).to(tl.float32)
    other = tl.load(_rows_of(before[1], before[3], where), there, 0.0).to(tl.float32)
    most = tl.maximum(mine, other)
    weight, other_weight = tl.exp(mine - most), tl.exp(other - most)
    total = weight + other_weight
    tl.store(_rows_of(place[1], place[3], where), most + tl.log(total), there)
    inside = there[:, None] & (column < depth)[None, :]
    left = tl.load(_elements_of(own[0], own[2], where, column), inside, 0.0).to(tl.float32)
    right = tl.load(_elements_of(before[0], before[2], where, column), inside, 0.0).to(tl.float32)
    merged = left + (other_weight / total)[:, None] * (right - left)
    tl.store(_elements_of(place[0], place[2], where, column), merged.to(place[0].dtype.element_ty), inside)


def merge_on_gpu(place: Both, own: Both, before: Both) -> None:
    """Write ``own`` and ``before`` together to ``place``, in float32, on the current stream."""
    batch, heads, rows, depth = own[0].shape
    parts = [(output, lse, output.stride(), lse.stride()) for output, lse in (own, before, place)]
    block = (_ROWS, triton.next_power_of_2(depth))
    with torch.cuda.device_of(own[0]):
        _merge[(triton.cdiv(rows, _ROWS), batch * heads)](*parts, (heads, rows, depth), block)
