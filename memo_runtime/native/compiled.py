"""Slabs and engines of the compiled core."""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch

from memo_runtime.errors import CopyUseError
from memo_runtime.native.engine import CopyEngine, Pair, Ticket
from memo_runtime.native.library import CUDA_DRIVER, Library, SlabInfo, packing
from memo_runtime.native.runs import six_numbers
from memo_runtime.native.slab import Offset, Slab

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
        self.library = library
        self._cell = _I64(0)  # written by the core itself: an interrupt behind the call does not lose it
        library.call("device_open", driver.encode(), ordinal, ctypes.byref(self._cell))

    @property
    def handle(self) -> int:
        """The core's number for it."""
        return self._cell.value

    @property
    def numa_node(self) -> int:
        """The node that the device hangs on; -1 where the system does not say."""
        return self.library.number("device_numa_node", _I32, self.handle)

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if self._cell.value and not _ending():
            self.library.call("device_close", self._cell.value)


class _Mapping:
    """Owns a slab of the core, from before it is there; unmapped when the last tensor over it is gone."""

    def __init__(self, library: Library, card: Card | None) -> None:
        self.library = library
        self.card = card
        self.info = SlabInfo()
        self.process = os.getpid()

    @property
    def handle(self) -> int:
        """The core's number for it."""
        return int(self.info.slab)

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # A forked child has neither the core's threads nor the driver's state.
        if self.info.slab and not _ending() and os.getpid() == self.process:
            self.library.call("slab_destroy", self.info.slab)


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
        self._library = library
        self._mapping = _Mapping(library, card)
        info = self._mapping.info
        handle, node = (card.handle, card.numa_node) if card is not None else (0, -1)
        library.call(
            "slab_create", handle, size_bytes, chunk_bytes, threads, node, int(allow_partial), ctypes.byref(info)
        )
        self.size, self.mapped = int(info.size), int(info.mapped)
        self.pinned, self.on_node = bool(info.pinned), bool(info.on_node)
        self.refusal = library.refusal(info.slab)
        buffer = (ctypes.c_uint8 * self.size).from_address(info.base)
        buffer._mapping = self._mapping  # type: ignore[attr-defined]  # tensors hold the buffer, and so the memory
        self.memory = torch.frombuffer(buffer, dtype=torch.uint8)

    def take(self, size_bytes: int, alignment: int, where: Offset) -> bool:
        """See ``Slab``."""
        self._library.call("slab_take", self._mapping.handle, size_bytes, alignment, ctypes.byref(where))
        return where.value >= 0

    def give(self, where: Offset) -> None:
        """See ``Slab``."""
        self._library.call("slab_give", self._mapping.handle, ctypes.byref(where))

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
        self._library = library
        self._card = card
        self._stream = stream
        self._at_once = at_once
        self._process = os.getpid()
        #: What is told when a ticket dies that was not used up; by number.
        self._alive: dict[int, weakref.ref[Ticket]] = {}
        self._cell = _I64(0)  # written by the core itself: an interrupt behind the call does not lose it
        library.call("engine_create", card.handle if card is not None else 0, threads, ctypes.byref(self._cell))
        self._handle = self._cell.value

    def _submit(self, out: bool, pairs: tuple[Pair, ...], name: str) -> Ticket:
        if self.closed:
            raise CopyUseError("the copy engine was closed")
        self._check_process()
        mine, numbers = self.device, []
        for source, target in pairs:
            host, device = (target, source) if out else (source, target)
            if device.device != mine:
                self._check_device(device)
            numbers.append(six_numbers(host, device))
            if not numbers[-1][1] and device.numel():
                raise CopyUseError("a tensor without memory (zeros of forward mode, a fake one) cannot be copied")
        number, stream = next(self._numbers), self._stream()
        ticket = Ticket(self, pairs, name, number=number, watched=out)
        # From here on the core is told when the ticket dies, by a function of C, while both ends are still there.
        self._alive[number] = weakref.ref(ticket, partial(self._library.drop, self._handle, number, stream))
        pack = _PACK_ONE if len(pairs) == 1 else packing(len(pairs)).pack
        request = pack(self._handle, number, stream, 0 if out else 1, len(pairs), *chain.from_iterable(numbers))
        status = self._library.submit(request, name.encode())
        if status < 0:
            self._forget(number)
            raise self._library.error(-status)
        if out and self._at_once:
            self._wait(number)
            ticket.settled()
        return ticket

    def _check_process(self) -> None:
        """A forked child has neither the core's threads nor the driver's state: whoever waits there waits for ever."""
        if os.getpid() != self._process:
            raise CopyUseError(
                "this process was forked in the middle of a step, and copies belong to the one that began it: fork "
                "before a forward or behind its backward, or set MEMO_NATIVE=off on the CPU"
            )

    def _wait(self, number: int) -> None:
        self._check_process()
        status = self._library.wait(self._handle, number, self._stream())
        if status:
            raise self._library.error(status)

    def _cancel(self, number: int) -> bool:
        return bool(self._library.number("cancel", _I32, self._handle, number, self._stream()))

    def _done(self, number: int) -> bool:
        return bool(self._library.number("done", _I32, self._handle, number))

    def _forget(self, number: int) -> None:
        self._alive.pop(number, None)

    @property
    def open_copies(self) -> int:
        """See ``CopyEngine``."""
        for number in [number for number, ticket in list(self._alive.items()) if ticket() is None]:
            self._forget(number)
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
            self._library.call("engine_destroy", self._cell.value)

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not self.closed and self._cell.value and not _ending() and os.getpid() == self._process:
            self.close()


def card_stream(device: torch.device) -> Callable[[], int]:
    """Gives the raw handle of PyTorch's current stream on ``device``, in this thread."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    current: Any = torch._C._cuda_getCurrentRawStream
    return lambda: int(current(index))
