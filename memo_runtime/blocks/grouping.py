"""Grouping saved tensors by the storage that they share, so that each byte is kept or moved once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memo_runtime.blocks.region import Region, compact_region, dense_region, flat_of
from memo_runtime.blocks.rerun import storage_key
from memo_runtime.records import TokenAxis


@dataclass(frozen=True, slots=True)
class Member:
    """One tensor of a group: which saved tensor it is (None: an input or a captured pin) and its token axis."""

    tensor: torch.Tensor
    axis: TokenAxis | None
    index: int | None = None


def by_storage(members: Sequence[Member]) -> list[list[Member]]:
    """Members that share storage, dtype and whether they have a token axis, in order of first appearance.

    Views that conjugate or negate what lies in memory (``x.conj()``) are apart: copying gives what they mean.

    Where their union leaves gaps in the storage (only one part of a fused projection is saved) each becomes a
    group of its own, of its packed bytes.
    """
    groups: dict[tuple[object, ...], list[Member]] = {}
    for member in members:
        lazy = (member.tensor.is_conj(), member.tensor.is_neg())
        key = (storage_key(member.tensor), member.tensor.dtype, member.axis is not None, *lazy)
        groups.setdefault(key, []).append(member)
    return list(groups.values())


def locate(members: Sequence[Member], tokens: int) -> list[tuple[Region, torch.Tensor, list[Member]]]:
    """(region, flat elements, members in the region's view order) of the members of one storage."""
    tensors = [member.tensor for member in members]
    region = dense_region(tensors, [member.axis for member in members], tokens)
    if region is not None:
        return [(region, flat_of(tensors[0], region), list(members))]
    pieces = []
    layouts: dict[tuple[object, ...], list[Member]] = {}
    for member in members:
        t = member.tensor
        layouts.setdefault((t.storage_offset(), tuple(t.shape), t.stride()), []).append(member)
    for same in layouts.values():
        region = dense_region([same[0].tensor], [same[0].axis], tokens)
        if region is not None:
            flat = flat_of(same[0].tensor, region)
        else:
            region, flat = compact_region(same[0].tensor, same[0].axis, tokens)
        views = region.views * len(same)
        pieces.append((Region(region.outer, region.tokens, region.inner, views), flat, same))
    return pieces


def whole(region: Region) -> Region:
    """The same bytes as one run without a token axis."""
    return Region(1, 1, region.numel, region.views)
