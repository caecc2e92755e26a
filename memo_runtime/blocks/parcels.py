"""What is copied where saved tensors are sorted by storage as they come: a parcel for each, small ones together.

A loop over tokens saves thousands of tensors of a few hundred bytes. Copied one by one they cost more than they are
worth, and left where they are they may be most of what a block holds. They share a parcel, by dtype, each at a
multiple of ``HOST_ALIGNMENT``, so that kernels find them aligned. Whatever a tensor shares its parcel with, it adds the
same bytes to it, so that sums over parts of a block are those of the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from memo_runtime.blocks.grouping import Member, by_storage, locate
from memo_runtime.blocks.region import Region, View
from memo_runtime.blocks.rerun import storage_key
from memo_runtime.sizes import HOST_ALIGNMENT, MIN_SWAP_BYTES

#: What PyTorch's allocator on CUDA rounds a request up to.
_CUDA_ROUNDING = 512


@dataclass(frozen=True, slots=True)
class Parcel:
    """Bytes that are copied as one: ``flat`` has the elements of ``region``, whose views are ``members``."""

    region: Region
    flat: torch.Tensor
    members: list[Member]

    @property
    def size_bytes(self) -> int:
        """Bytes that are copied."""
        return self.flat.numel() * self.flat.element_size()


@dataclass(frozen=True, slots=True)
class Parcels:
    """All parcels of some tensors. ``gathered``: bytes that were copied on the device to make them."""

    parcels: list[Parcel]
    gathered: int


def parcels_of(members: Sequence[Member], *, whole: int | None) -> Parcels:
    """The parcels of ``members``; storage ``whole`` (a block's input) is packed with nothing."""
    own = {storage_key(member.tensor) for member in members}
    found = [Parcel(*located) for same in by_storage(members) for located in locate(same, 1)]
    small: dict[tuple[torch.dtype, bool], list[Parcel]] = {}
    parcels = []
    for parcel in found:
        if parcel.size_bytes >= MIN_SWAP_BYTES or storage_key(parcel.members[0].tensor) == whole:
            parcels.append(parcel)
        else:
            # What only a rerun reads is gone before the rest is.
            read = any(member.index is not None for member in parcel.members)
            small.setdefault((parcel.flat.dtype, read), []).append(parcel)
    packed = [_packed(together) for together in small.values()]
    copies = [parcel for parcel in (*found, *packed) if storage_key(parcel.flat) not in own]
    return Parcels(parcels + packed, sum(parcel.size_bytes for parcel in copies))


def _packed(small: Sequence[Parcel]) -> Parcel:
    first = small[0].flat
    unit = HOST_ALIGNMENT // first.element_size()
    sizes: list[int] = []
    views: list[View] = []
    total = 0
    for parcel in small:
        count = parcel.region.numel
        views += [replace(view, offset=view.offset + total) for view in parcel.region.views]
        sizes += [count, -count % unit]
        total += count + -count % unit
    flat = torch.empty(total, dtype=first.dtype, device=first.device)
    # Conjugated and negated views: what they mean is packed, not what lies in memory.
    meant = [parcel.flat.resolve_conj().resolve_neg() for parcel in small]
    torch._foreach_copy_(list(flat.split(sizes)[::2]), meant)
    return Parcel(Region(1, 1, total, tuple(views)), flat, [member for parcel in small for member in parcel.members])


def held_bytes(tensors: Iterable[torch.Tensor], hidden: torch.Tensor | None = None) -> int:
    """Device bytes of the storages behind ``tensors``, each once.

    Of that of ``hidden``, a block's input, only what it has itself: the rest of it, if any, is its maker's.
    """
    sizes = {storage_key(tensor): _storage_bytes(tensor) for tensor in tensors}
    if hidden is not None and storage_key(hidden) in sizes:
        sizes[storage_key(hidden)] = min(_storage_bytes(hidden), _rounded(hidden, hidden.nbytes))
    return sum(sizes.values())


def _storage_bytes(tensor: torch.Tensor) -> int:
    return _rounded(tensor, tensor.untyped_storage().nbytes())


def _rounded(tensor: torch.Tensor, size_bytes: int) -> int:
    return -(-size_bytes // _CUDA_ROUNDING) * _CUDA_ROUNDING if tensor.is_cuda else size_bytes
