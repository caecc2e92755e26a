"""One piece of host memory of exactly the size asked for, and slots in it."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod

import torch

#: Where a slot starts; -1: nowhere. A cell of its owner's, written in the same moment in which the slab takes note, so
#: that an interrupt, wherever it is raised, finds both or neither.
Offset = ctypes.c_int64


def no_offset() -> Offset:
    """An empty cell."""
    return Offset(-1)


class Slab(ABC):
    """Host memory, pinned on CUDA.

    Attributes:
        memory: all of it, uint8; it stays readable for as long as a tensor over it is alive, also after ``close``.
        size: usable bytes: as asked, or less where the system refused more and that was allowed.
        mapped: ``size`` to the page; what is pinned on CUDA.
        pinned: registered with CUDA. on_node: preferred on the device's NUMA node.
        refusal: why ``size`` is less than asked; empty where it is not.
    """

    memory: torch.Tensor
    size: int
    mapped: int
    pinned: bool = False
    on_node: bool = False
    refusal: str = ""

    @abstractmethod
    def take(self, size_bytes: int, alignment: int, where: Offset) -> bool:
        """Write the offset of free bytes, the lowest that fits, into ``where``; False if there are none.

        Raises:
            CopyUseError: the slab was closed, or 0 bytes were asked for.
        """

    @abstractmethod
    def give(self, where: Offset) -> None:
        """Give back what was taken at ``where``, and empty that.

        Raises:
            CopyUseError: nothing is taken there.
        """

    @property
    @abstractmethod
    def in_use(self) -> int:
        """Bytes that are taken."""

    @abstractmethod
    def close(self) -> None:
        """Wait for copies under way and unpin. No copy and no slot afterwards; a second time does nothing."""
