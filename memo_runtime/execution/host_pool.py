"""The host tier: slabs of (pinned) memory of exactly the size asked for, and a first-fit sub-allocator.

PyTorch's own pinned pool rounds every request up to a power of two. A slab here is ordinary memory that is
registered with CUDA afterwards, so pinned bytes are the bytes of the plan. A slot belongs to whoever holds it and
goes back to the pool when it is dropped.
"""

from __future__ import annotations

import bisect
import mmap
import threading

import torch

from memo_runtime.errors import HostLimitError
from memo_runtime.records import HOST_ALIGNMENT
from memo_runtime.units import format_bytes

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context


def aligned(size_bytes: int) -> int:
    """``size_bytes`` rounded up to a slot."""
    return -(-size_bytes // HOST_ALIGNMENT) * HOST_ALIGNMENT


class _Slab:
    """One piece of host memory with its free intervals, sorted and coalesced."""

    def __init__(self, size_bytes: int, pinned: bool) -> None:
        # Pages of its own: CUDA registers whole pages, and no page twice.
        self.memory = torch.frombuffer(mmap.mmap(-1, size_bytes), dtype=torch.uint8)
        self.size = size_bytes
        self.free: list[tuple[int, int]] = [(0, size_bytes)]
        self.pinned = False
        if pinned:
            self.memory.zero_()  # touched by all threads first: registering would touch page after page
            _check(torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), size_bytes, _PORTABLE))
            self.pinned = True

    def take(self, size: int) -> int | None:
        """Offset of ``size`` free bytes, the lowest that fits; None if there are none."""
        for index, (start, length) in enumerate(self.free):
            if length >= size:
                if length == size:
                    del self.free[index]
                else:
                    self.free[index] = (start + size, length - size)
                return start
        return None

    def give(self, start: int, size: int) -> None:
        """Return an interval."""
        index = bisect.bisect(self.free, (start, size))
        self.free.insert(index, (start, size))
        if index + 1 < len(self.free) and start + size == self.free[index + 1][0]:
            self.free[index] = (start, size + self.free.pop(index + 1)[1])
        if index > 0 and sum(self.free[index - 1]) == start:
            before, length = self.free[index - 1]
            self.free[index - 1] = (before, length + self.free.pop(index)[1])

    def close(self) -> None:
        """Unpin the memory."""
        if self.pinned:
            self.pinned = False
            _check(torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr()))

    def __del__(self) -> None:
        # Memory that is freed while registered could not be registered again by its next owner.
        if getattr(self, "pinned", False):
            self.close()


def _check(status: object) -> None:
    if int(status) != 0:  # type: ignore[call-overload]
        raise HostLimitError(f"CUDA could not pin host memory: error {status}. Lower host_budget or free memory")


class Slot:
    """A piece of host memory; dropping it gives it back."""

    __slots__ = ("_pool", "_slab", "memory", "size", "start")

    def __init__(self, pool: HostPool, slab: _Slab, start: int, size: int, used: int) -> None:
        self._pool = pool
        self._slab = slab
        self.start = start
        self.size = size
        self.memory = slab.memory[start : start + used]

    def typed(self, dtype: torch.dtype) -> torch.Tensor:
        """The slot as a flat tensor of ``dtype``."""
        return self.memory.view(dtype)

    def __del__(self) -> None:
        self._pool._give(self._slab, self.start, self.size)


class HostPool:
    """Host memory within ``limit`` bytes.

    Args:
        limit: most bytes that may be reserved.
        pinned: register slabs with CUDA, for asynchronous copies.
    """

    def __init__(self, limit: int, *, pinned: bool) -> None:
        self.limit = limit
        self._pinned = pinned
        self._slabs: list[_Slab] = []
        self._lock = threading.RLock()  # a slot may be dropped by the garbage collector while one is taken
        self.in_use = 0

    @property
    def reserved(self) -> int:
        """Bytes of all slabs: what is pinned on CUDA."""
        return sum(slab.size for slab in self._slabs)

    def reserve(self, size_bytes: int) -> None:
        """Make sure that the slabs hold ``size_bytes`` in all, before a step needs them.

        Raises:
            HostLimitError: the limit is lower; nothing was allocated.
        """
        with self._lock:
            missing = aligned(size_bytes) - self.reserved
            if missing > 0:
                self._grow(missing)

    def fit(self, size_bytes: int) -> None:
        """Like ``reserve``, for a plan that takes the place of another.

        What is there stays where it is enough: pinning memory anew takes longer than a short step, and lengths may
        change with every step. Where it is not, one slab of the new size replaces what is unused, so that a run of many
        lengths holds what its largest plan needs and no more.

        Raises:
            HostLimitError: the limit is lower; what was unused was freed.
        """
        with self._lock:
            if not aligned(size_bytes) <= self.reserved <= self.limit:
                self.trim()
            self.reserve(size_bytes)

    def take(self, size_bytes: int) -> Slot:
        """A slot of ``size_bytes``; a new slab where none has room.

        Raises:
            HostLimitError: the limit does not allow another slab; nothing was changed.
        """
        size = aligned(size_bytes)
        with self._lock:
            for slab in self._slabs:
                start = slab.take(size)
                if start is not None:
                    break
            else:
                slab = self._grow(size)
                start = slab.take(size)
                assert start is not None, "a new slab has room for what it was made for"
            self.in_use += size
            return Slot(self, slab, start, size, size_bytes)

    def _grow(self, size: int) -> _Slab:
        if self.reserved + size > self.limit:
            raise HostLimitError(
                f"the step asks for {format_bytes(size)} of host memory beyond the {format_bytes(self.reserved)} that "
                f"are reserved ({format_bytes(self.in_use)} in use), and {format_bytes(self.limit)} is the limit. A "
                "plan counts one forward pass between two backward passes, of the lengths and tensors that it was "
                f"made for. Would work: host_budget of at least {format_bytes(self.reserved + size)}, going backward "
                "before the next forward, a larger keep_last, or policy='recompute'"
            )
        slab = _Slab(size, self._pinned)
        self._slabs.append(slab)
        return slab

    def _give(self, slab: _Slab, start: int, size: int) -> None:
        with self._lock:
            self.in_use -= size
            slab.give(start, size)

    def trim(self) -> None:
        """Free the slabs of which nothing is in use."""
        with self._lock:
            unused = [slab for slab in self._slabs if slab.free == [(0, slab.size)]]
            self._slabs = [slab for slab in self._slabs if slab not in unused]
            for slab in unused:
                slab.close()
