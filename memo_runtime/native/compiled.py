"""Slabs and engines of the compiled core."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from memo_runtime.errors import CopyUseError
from memo_runtime.native.engine import CopyEngine, Pair, Ticket
from memo_runtime.native.library import CUDA_DRIVER, Library, SlabInfo, packing
from memo_runtime.native.runs import six_numbers
from memo_runtime.native.slab import Slab

# At the end of a process nothing is given back: modules go first, in no order, and the system takes everything. What
# __del__ needs to know that is bound as a default, since names of modules are gone by then.

_PACK_ONE = packing(1).pack
_I32, _I64, _U64 = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64


class Card:
    """One CUDA device as the core sees it, by the library of its driver; closed when it is dropped.

    Raises:
        NativeUnavailableError: there is no driver.
        CopyUseError: there is no such device.
    """

    def __init__(self, library: Library, ordinal: int, driver: str = CUDA_DRIVER) -> None:
        self.handle = 0
        self.library = library
        self.handle = library.number("device_open", _I64, driver.encode(), ordinal)

    @property
    def numa_node(self) -> int:
        """The node that the device hangs on; -1 where the system does not say."""
        return self.library.number("device_numa_node", _I32, self.handle)

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if self.handle and not _ending():
            self.library.call("device_close", self.handle)


class _Mapping:
    """Owns a slab of the core; unmapped when the last tensor over it is gone."""

    def __init__(self, library: Library, card: Card | None, handle: int) -> None:
        self.library = library
        self.card = card
        self.handle = handle
        self.process = os.getpid()

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # A forked child has neither the core's threads nor the driver's state.
        if not _ending() and os.getpid() == self.process:
            self.library.call("slab_destroy", self.handle)


class CompiledSlab(Slab):
    """A slab of the core.

    Args:
        card: pinned for this device; None: not pinned, and the memory comes when it is used.
        chunk_bytes: bytes per registration, 0 for one. threads: that touch the memory.
        allow_partial: keep what there was before the system refused.

    Raises:
        PinningError: the system gives no more memory, or does not pin it. Nothing is kept.
    """

    def __init__(
        self,
        library: Library,
        size_bytes: int,
        *,
        card: Card | None = None,
        chunk_bytes: int = 0,
        threads: int = 0,
        allow_partial: bool = False,
    ) -> None:
        info = SlabInfo()
        handle, node = (card.handle, card.numa_node) if card is not None else (0, -1)
        library.call(
            "slab_create", handle, size_bytes, chunk_bytes, threads, node, int(allow_partial), ctypes.byref(info)
        )
        self._library = library
        self._mapping = _Mapping(library, card, info.slab)
        self.size, self.mapped = int(info.size), int(info.mapped)
        self.pinned, self.on_node = bool(info.pinned), bool(info.on_node)
        self.refusal = library.refusal(info.slab)
        buffer = (ctypes.c_uint8 * self.size).from_address(info.base)
        buffer._mapping = self._mapping  # type: ignore[attr-defined]  # tensors hold the buffer, and so the memory
        self.memory = torch.frombuffer(buffer, dtype=torch.uint8)

    def take(self, size_bytes: int, alignment: int) -> int | None:
        """See ``Slab``."""
        offset = self._library.number("slab_take", _I64, self._mapping.handle, size_bytes, alignment)
        return None if offset < 0 else offset

    def give(self, offset: int) -> None:
        """See ``Slab``."""
        self._library.call("slab_give", self._mapping.handle, offset)

    @property
    def in_use(self) -> int:
        """See ``Slab``."""
        return self._library.number("slab_in_use", _U64, self._mapping.handle)

    def close(self) -> None:
        """See ``Slab``."""
        self._library.call("slab_close", self._mapping.handle)


class CompiledEngine(CopyEngine):
    """An engine of the core: copy engines of a GPU, or threads.

    Args:
        device: of the device ends. card: the GPU; None: ``threads`` threads copy within host memory.
        stream: gives the handle of the current stream.
        at_once: copies to the host are made before ``to_host`` returns. Without a GPU nothing orders them before what
            modifies their source afterwards.
    """

    def __init__(
        self,
        library: Library,
        device: torch.device,
        *,
        card: Card | None = None,
        threads: int = 1,
        stream: Callable[[], int] = lambda: 0,
        at_once: bool = False,
    ) -> None:
        super().__init__(device)
        self.closed = True
        self._library = library
        self._card = card
        self._stream = stream
        self._at_once = at_once
        self._process = os.getpid()
        self._handle = library.number("engine_create", _I64, card.handle if card is not None else 0, threads)
        self.closed = False

    def _submit(self, out: bool, pairs: tuple[Pair, ...], name: str) -> Ticket:
        if self.closed:
            raise CopyUseError("the copy engine was closed")
        mine, numbers = self.device, []
        for source, target in pairs:
            host, device = (target, source) if out else (source, target)
            if device.device != mine:
                self._check_device(device)
            numbers.append(six_numbers(host, device))
        head = (self._handle, self._stream(), 0 if out else 1, len(pairs))
        pack = _PACK_ONE if len(pairs) == 1 else packing(len(pairs)).pack
        number = self._library.submit(pack(*head, *itertools.chain.from_iterable(numbers)), name.encode())
        if number < 0:
            raise self._library.error(-number)
        if out and self._at_once:
            self._wait(number)
            number = None
        return Ticket(self, number, pairs, name, watched=out)

    def _wait(self, number: int) -> None:
        status = self._library.wait(self._handle, number, self._stream())
        if status:
            raise self._library.error(status)

    def _cancel(self, number: int) -> bool:
        return bool(self._library.number("cancel", _I32, self._handle, number, self._stream()))

    def _done(self, number: int) -> bool:
        return bool(self._library.number("done", _I32, self._handle, number))

    @property
    def open_copies(self) -> int:
        """See ``CopyEngine``."""
        return 0 if self.closed else self._library.number("engine_num_open", _I64, self._handle)

    def stream_handle(self, *, to_host: bool) -> int:
        """See ``CopyEngine``."""
        return self._library.number("engine_stream", _U64, self._handle, 0 if to_host else 1)

    def drain(self) -> None:
        """See ``CopyEngine``."""
        self._library.call("engine_drain", self._handle)

    def close(self) -> None:
        """See ``CopyEngine``."""
        if not self.closed:
            self.closed = True
            self._library.call("engine_destroy", self._handle)

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not getattr(self, "closed", True) and not _ending() and os.getpid() == self._process:
            self.close()


def card_stream(device: torch.device) -> Callable[[], int]:
    """Gives the raw handle of PyTorch's current stream on ``device``, in this thread."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    current: Any = torch._C._cuda_getCurrentRawStream
    return lambda: int(current(index))
