"""The twin of the compiled core in Python: what it is tested against, and what works without it.

On CPU copies are made at once. On CUDA they go on PyTorch streams; many runs of one copy go through cuda-python where
that is installed, else one by one. Memory is registered in one piece, since PyTorch's copies may not cross from one
registration into another: a refusal leaves nothing.
"""

from __future__ import annotations

import importlib.util
import mmap
import threading
import weakref
from collections import deque
from typing import Any, ClassVar

import torch

from memo_runtime.errors import CopyError, CopyUseError, PinningError
from memo_runtime.native.engine import CopyEngine, Pair, Ticket
from memo_runtime.native.runs import Runs, matched
from memo_runtime.native.slab import Offset, Slab

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context


class FreeList:
    """First fit: the lowest free interval that is large enough.

    What is taken is all that it knows, so that no interrupt can leave it half changed; free intervals lie between.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken: dict[int, int] = {}  # offset -> length

    @property
    def in_use(self) -> int:
        """Bytes that are taken."""
        return sum(self._taken.values())

    def take(self, size: int, alignment: int, where: Offset) -> bool:
        """Write the offset of ``size`` bytes into ``where``; False where nothing fits."""
        start = 0
        for begin, length in (*sorted(self._taken.items()), (self._size, 0)):
            if start + size <= begin:
                # Nothing is called between the two, so no interrupt is raised there either.
                self._taken[start] = size
                where.value = start
                return True
            start = -(-(begin + length) // alignment) * alignment
        return False

    def give(self, where: Offset) -> bool:
        """Free what was taken at ``where``, and empty that; False where nothing was."""
        start = where.value
        if start not in self._taken:
            return False
        del self._taken[start]
        where.value = -1
        return True


class TorchSlab(Slab):
    """A slab of ordinary memory, registered with CUDA where ``pinned``.

    Raises:
        PinningError: the system gives no more memory, or does not pin it.
    """

    #: Which host memory engines may touch.
    _all: ClassVar[weakref.WeakSet[TorchSlab]] = weakref.WeakSet()
    _lock = threading.RLock()

    def __init__(self, size_bytes: int, *, pinned: bool) -> None:
        if size_bytes <= 0:
            raise CopyUseError("a slab of 0 bytes was asked for")
        try:
            self.memory = torch.frombuffer(mmap.mmap(-1, size_bytes), dtype=torch.uint8)
        except (OSError, OverflowError) as error:
            raise PinningError(f"the system does not map {size_bytes} bytes: {error}") from None
        self.size = size_bytes
        self.mapped = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._free = FreeList(size_bytes)
        if pinned:
            self.memory.zero_()  # touched by all threads first: registering would touch page after page
            self._register()
        self._open = True
        with self._lock:
            self._all.add(self)

    def _register(self) -> None:
        status = torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), self.size, _PORTABLE)
        if int(status) != 0:
            raise PinningError(f"CUDA does not pin {self.size} bytes of host memory: {status}")
        self.pinned = True

    def take(self, size_bytes: int, alignment: int, where: Offset) -> bool:
        """See ``Slab``."""
        if size_bytes <= 0 or alignment <= 0:
            raise CopyUseError("a slot of 0 bytes, or aligned to 0, was asked for")
        with self._lock:
            if not self._open:
                raise CopyUseError("the slab was freed: no slot can be taken from it")
            return self._free.take(size_bytes, alignment, where)

    def give(self, where: Offset) -> None:
        """See ``Slab``."""
        with self._lock:
            if not self._free.give(where):
                raise CopyUseError(f"no slot is taken at offset {where.value}: it was given back before")

    @property
    def in_use(self) -> int:
        """See ``Slab``."""
        return self._free.in_use

    def close(self) -> None:
        """See ``Slab``."""
        with self._lock:
            if not self._open:
                return
            self._open = False
        if self.pinned:
            torch.cuda.synchronize()  # copies under way would lose the memory under them
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())

    def __del__(self) -> None:
        # Memory that is freed while registered could not be registered again by its next owner.
        if getattr(self, "_open", False):
            self.close()

    @classmethod
    def check(cls, runs: Runs) -> None:
        """The host end of a copy lies in an open slab.

        Raises:
            CopyUseError: it does not.
        """
        with cls._lock:
            for slab in cls._all:
                offset = runs.address - slab.memory.data_ptr()
                if slab._open and offset >= 0 and offset + runs.span <= slab.size:
                    return
        raise CopyUseError(
            f"host address {runs.address:#x} lies in no slab: the slab was freed, or the memory is not of this pool"
        )


class _UnderWay(weakref.ref[Ticket]):
    """A submission, told when its ticket dies; it keeps both ends until the engine has seen to that."""

    __slots__ = ("compute", "event", "failure", "held", "number")
    number: int
    held: tuple[Pair, ...]
    #: The stream that made the sources, or owns the targets.
    compute: Any
    #: Behind the copies; None: an interrupt came before it.
    event: Any
    failure: str


class TorchEngine(CopyEngine):
    """Copies made by PyTorch: on CUDA on one stream each way, on CPU at once."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._tickets: dict[int, _UnderWay] = {}
        self._dropped: deque[Any] = deque()
        self._lock = threading.Lock()
        self._bindings = importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings")
        # Each way its own stream: the two directions use different copy engines and overlap.
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []

    def _submit(self, out: bool, pairs: tuple[Pair, ...], name: str) -> Ticket:
        if self.closed:
            raise CopyUseError("the copy engine was closed")
        self._settle()
        checked = []
        names = name.split("\n")
        for place, (source, target) in enumerate(pairs):
            self._check_device(source if out else target)
            one, other = matched(source, target)
            if one.width and one.height:
                TorchSlab.check(other if out else one)
                checked.append((names[min(place, len(names) - 1)], source, target, one, other))
        number = next(self._numbers)
        if not self._streams:
            for _, source, target, _, _ in checked:
                target.copy_(source)
            ticket = Ticket(self, pairs, name, number=number)
            ticket.settled()
            return ticket
        ticket = Ticket(self, pairs, name, number=number, watched=out)
        stream = self._streams[0 if out else 1]
        under_way = self._noted(ticket, pairs)
        stream.wait_stream(under_way.compute)
        begun = 0
        with torch.cuda.stream(stream):
            try:
                for _, source, target, one, other in checked:
                    begun += 1
                    self._copy(stream, source, target, (one, other))
            except RuntimeError as error:  # what CUDA refused belongs to whoever waits for it
                copied = checked[begun - 1][0]
                under_way.failure = f"copying {repr(copied) if copied else 'a tensor'} failed: {error}"
            event = torch.cuda.Event()
            event.record(stream)
            under_way.event = event
        return ticket

    def _noted(self, ticket: Ticket, pairs: tuple[Pair, ...]) -> _UnderWay:
        under_way = _UnderWay(ticket, self._dropped.append)
        under_way.number, under_way.held = ticket.number, pairs
        under_way.compute = torch.cuda.current_stream(self.device)
        under_way.event, under_way.failure = None, ""
        self._tickets[ticket.number] = under_way
        return under_way

    def _settle(self) -> None:
        """Let compute wait for copies whose tickets were dropped, then let go of both ends."""
        with self._lock:
            while self._dropped:
                under_way = self._tickets.get(self._dropped[0].number)
                if under_way is not None:
                    self._wait_for(under_way, under_way.compute)
                    self._forget(under_way.number)
                self._dropped.popleft()

    def _wait_for(self, under_way: _UnderWay, compute: Any) -> None:
        if under_way.event is not None:
            compute.wait_event(under_way.event)
        else:
            for stream in self._streams:
                compute.wait_stream(stream)

    def _copy(
        self, stream: torch.cuda.Stream, source: torch.Tensor, target: torch.Tensor, runs: tuple[Runs, Runs]
    ) -> None:
        if runs[0].height == 1:
            target.copy_(source, non_blocking=True)
        elif self._bindings:
            _copy_rows(stream, runs)
        else:
            # Each run is one plain asynchronous copy; a strided one would go through a temporary.
            for one, other in zip(_rows(source, runs[0]), _rows(target, runs[1]), strict=True):
                other.copy_(one, non_blocking=True)

    def _wait(self, number: int) -> None:
        under_way = self._tickets.get(number)
        if under_way is None:
            raise CopyUseError(f"ticket {number} was used up: it was waited for or cancelled before")
        self._wait_for(under_way, torch.cuda.current_stream(self.device))
        if under_way.failure:
            raise CopyError(under_way.failure)

    def _cancel(self, number: int) -> bool:
        self._wait_for(self._tickets[number], torch.cuda.current_stream(self.device))
        return False

    def _done(self, number: int) -> bool:
        under_way = self._tickets.get(number)
        return under_way is None or bool(under_way.event.query())

    def _forget(self, number: int) -> None:
        self._tickets.pop(number, None)

    @property
    def open_copies(self) -> int:
        """See ``CopyEngine``."""
        self._settle()
        return len(self._tickets)

    def stream_handle(self, *, to_host: bool) -> int:
        """See ``CopyEngine``."""
        return int(self._streams[0 if to_host else 1].cuda_stream) if self._streams else 0

    def drain(self) -> None:
        """See ``CopyEngine``."""
        if self.closed:
            raise CopyUseError("the copy engine was closed")
        for stream in self._streams:
            stream.synchronize()

    def close(self) -> None:
        """See ``CopyEngine``."""
        if not self.closed:
            self.drain()
            self.closed = True
            self._tickets.clear()


def _rows(tensor: torch.Tensor, runs: Runs) -> list[torch.Tensor]:
    """``tensor`` as one flat tensor per run."""
    unit = tensor.element_size()
    shape, stride = (runs.height, runs.width // unit), (runs.pitch // unit, 1)
    return list(tensor.as_strided(shape, stride, tensor.storage_offset()))


def _copy_rows(stream: torch.cuda.Stream, runs: tuple[Runs, Runs]) -> None:
    from cuda.bindings import runtime

    (source, target), kind = runs, runtime.cudaMemcpyKind.cudaMemcpyDefault
    ends = (target.address, target.pitch, source.address, source.pitch)
    (status,) = runtime.cudaMemcpy2DAsync(*ends, source.width, source.height, kind, stream.cuda_stream)
    if int(status) != 0:
        raise RuntimeError(str(status))
