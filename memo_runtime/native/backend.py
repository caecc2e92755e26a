"""The native core or its twin, by a mode that has a name.

    auto   the native core where it loads (and, on CUDA, finds the driver); else the twin, and one line in the log
    on     the native core, or ``NativeUnavailableError``
    off    the twin
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod

import torch

from memo_runtime.config import NativeMode, native_mode
from memo_runtime.errors import NativeUnavailableError
from memo_runtime.native.compiled import Card, CompiledEngine, CompiledSlab, card_stream
from memo_runtime.native.engine import CopyEngine
from memo_runtime.native.library import CUDA_DRIVER, Library, library
from memo_runtime.native.slab import Slab
from memo_runtime.native.twin import TorchEngine, TorchSlab
from memo_runtime.units import GiB

logger = logging.getLogger("memo_runtime")

#: Registered in one call. Pinning holds up other work in the process, and some drivers refuse very large pieces.
CHUNK_BYTES = GiB
#: That touch fresh memory; more do not help once the memory's bandwidth is used.
_TOUCHING = 16
#: That copy between two places in host memory.
_COPYING = 4


class Backend(ABC):
    """Makes slabs and engines for one device.

    Attributes:
        name: ``native`` or ``torch``. device: where the device ends of copies are; slabs are pinned where it is a GPU.
        reason: why it is this one.
    """

    name: str

    def __init__(self, device: torch.device, reason: str = "") -> None:
        self.device = device
        self.reason = reason

    @property
    def description(self) -> str:
        """For reports: who copies, and why."""
        who = "the native core" if self.name == "native" else "PyTorch"
        return f"{who} ({self.reason})" if self.reason else who

    @abstractmethod
    def slab(self, size_bytes: int, *, allow_partial: bool = False) -> Slab:
        """Host memory of ``size_bytes``; with ``allow_partial`` what the system gives of it.

        Raises:
            PinningError: the system gives no more memory, or does not pin it. Nothing is kept.
        """

    @abstractmethod
    def engine(self) -> CopyEngine:
        """A copy engine."""


class CompiledBackend(Backend):
    """The native core.

    Raises:
        NativeUnavailableError: it is not built, or there is no CUDA driver for a CUDA device.
    """

    name = "native"

    def __init__(
        self, device: torch.device, reason: str = "", *, core: Library | None = None, driver: str = CUDA_DRIVER
    ) -> None:
        super().__init__(device, reason)
        self._library = core or library()
        self._card: Card | None = None
        self._processors = len(os.sched_getaffinity(0))
        if device.type == "cuda":
            index = device.index if device.index is not None else torch.cuda.current_device()
            self.device = torch.device("cuda", index)
            self._card = Card(self._library, index, driver)

    def slab(self, size_bytes: int, *, allow_partial: bool = False) -> Slab:
        """See ``Backend``."""
        return CompiledSlab(
            self._library,
            size_bytes,
            card=self._card,
            chunk_bytes=CHUNK_BYTES,
            threads=min(_TOUCHING, self._processors) if self._card is not None else 0,
            allow_partial=allow_partial,
        )

    def engine(self) -> CopyEngine:
        """See ``Backend``."""
        if self._card is None:
            return CompiledEngine(self._library, self.device, threads=min(_COPYING, self._processors), at_once=True)
        return CompiledEngine(self._library, self.device, card=self._card, stream=card_stream(self.device))


class TorchBackend(Backend):
    """The twin."""

    name = "torch"

    def __init__(self, device: torch.device, reason: str = "") -> None:
        super().__init__(device, reason)
        if device.type == "cuda" and device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())

    def slab(self, size_bytes: int, *, allow_partial: bool = False) -> Slab:
        """See ``Backend``; it is pinned whole or not at all."""
        return TorchSlab(size_bytes, pinned=self.device.type == "cuda")

    def engine(self) -> CopyEngine:
        """See ``Backend``."""
        return TorchEngine(self.device)


def choose_backend(device: torch.device, mode: str | None = None) -> Backend:
    """The backend for ``device`` by ``mode``; None: the environment variable ``MEMO_NATIVE``, else ``auto``.

    Raises:
        NativeUnavailableError: mode ``on``, and the native core cannot be used.
        ArgumentError: an unknown mode.
    """
    chosen = native_mode(mode)
    if chosen is NativeMode.OFF:
        return TorchBackend(device, "MEMO_NATIVE=off")
    try:
        return CompiledBackend(device, f"MEMO_NATIVE={chosen.value}")
    except NativeUnavailableError as error:
        if chosen is NativeMode.ON:
            raise
        logger.info("copies go through PyTorch: %s", error)
        return TorchBackend(device, str(error))
