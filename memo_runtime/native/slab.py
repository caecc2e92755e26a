"""One piece of host memory of exactly the size asked for, and slots in it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


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
    def take(self, size_bytes: int, alignment: int) -> int | None:
        """Offset of free bytes, the lowest that fits; None if there are none.

        Raises:
            CopyUseError: the slab was closed, or 0 bytes were asked for.
        """

    @abstractmethod
    def give(self, offset: int) -> None:
        """Give back what was taken at ``offset``.

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
