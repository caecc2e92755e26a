"""Tensors as the runs of memory that copies are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch

from memo_runtime.errors import CopyUseError


class Runs(NamedTuple):
    """``height`` runs of ``width`` bytes, each ``pitch`` bytes behind the one before."""

    address: int
    width: int
    height: int
    pitch: int

    @property
    def span(self) -> int:
        """Bytes from the first to the last."""
        return self.pitch * (self.height - 1) + self.width if self.height else 0


def runs_of(tensor: torch.Tensor) -> Runs:
    """The runs of ``tensor``, which may have one gap size: [outer, rows, inner] with whole rows, or anything packed.

    Raises:
        CopyUseError: its elements lie in memory in another way.
    """
    width = height = 1
    pitch = 0
    for size, step in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if size == 1:
            continue
        if size == 0:
            return Runs(tensor.data_ptr(), 0, 0, 0)
        if height == 1 and step == width:
            width *= size
        elif height == 1 and step > width:
            height, pitch = size, step
        elif height > 1 and step == pitch * height:
            height *= size
        else:
            raise CopyUseError(
                f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not a number of equal runs "
                "of memory; copy a contiguous tensor, or rows of one"
            )
    unit = tensor.element_size()
    return Runs(tensor.data_ptr(), width * unit, height, pitch * unit)


def six_numbers(host: torch.Tensor, device: torch.Tensor) -> tuple[int, int, int, int, int, int]:
    """(host address, device address, width, height, host pitch, device pitch) of a copy between the two.

    Raises:
        CopyUseError: see ``matched``.
    """
    # What replay copies, without the general search: it would be half of the host's time for a copy.
    if host.dtype == device.dtype and host.shape == device.shape and host.is_contiguous():
        if device.is_contiguous():
            return host.data_ptr(), device.data_ptr(), host.nbytes, 1, 0, 0
        if device.dim() == 3:
            outer, rows, inner = device.shape
            step, row_step, unit_step = device.stride()
            if unit_step == 1 and row_step == inner and step >= rows * inner:
                unit = device.itemsize
                width = rows * inner * unit
                return host.data_ptr(), device.data_ptr(), width, outer, width, step * unit
    one, other = matched(host, device)
    return one.address, other.address, one.width, one.height, one.pitch, other.pitch


def matched(source: torch.Tensor, target: torch.Tensor) -> tuple[Runs, Runs]:
    """The runs of both ends of a copy, with one width and height.

    Raises:
        CopyUseError: other shapes or dtypes, or no runs that fit each other.
    """
    if source.shape != target.shape or source.dtype != target.dtype:
        raise CopyUseError(
            f"a copy of {tuple(source.shape)} {source.dtype} into {tuple(target.shape)} {target.dtype}: both ends of "
            "a copy have one shape and dtype"
        )
    one, other = runs_of(source), runs_of(target)
    if one.height == 1 and other.height > 1:
        one = Runs(one.address, other.width, other.height, other.width)
    elif other.height == 1 and one.height > 1:
        other = Runs(other.address, one.width, one.height, one.width)
    if one.width != other.width:
        raise CopyUseError(
            f"the runs of a copy do not fit: {one.height} of {one.width} bytes, and {other.height} of {other.width}"
        )
    return one, other
