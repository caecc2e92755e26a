"""The stash of tiled blocks in host memory.

    compute     | forward of block i | forward of block i+1 | ...  | backward of i+1 | backward of i
    to host     |                    | x, o, lse of block i |      |                 |
    to device   |                    |                      |      | those of block i|

A block's copies to the host start when its forward ends; their sources are freed when the next block but one starts, or
when backward does. A block that goes backward takes what was fetched for it, and starts the fetch for the block below.
Entries belong to autograd's graph: when it is freed, after backward or because a step was abandoned, host memory goes
back by itself.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping

import torch

from memo_runtime.errors import StateChangedError
from memo_runtime.native.engine import CopyEngine, Ticket
from memo_runtime.native.pool import HostPool, Slot


class _Copy:
    """One tensor on its way to the host and back."""

    def __init__(self, source: torch.Tensor, slot: Slot) -> None:
        self.shape = source.shape
        self.stride = source.stride()
        self.dtype = source.dtype
        self.slot = slot
        self.out: Ticket | None = None
        self.back: Ticket | None = None
        self.target: torch.Tensor | None = None

    def memory(self) -> torch.Tensor:
        """The host memory as [1, elements, 1], what transfers take."""
        return self.slot.typed(self.dtype).view(1, -1, 1)


class Entry:
    """What one call has in host memory, by place among the tensors that it stashes."""

    def __init__(self, swap: TiledSwap, copies: Mapping[int, _Copy]) -> None:
        self._swap = swap
        self._copies = dict(copies)
        self.lower: weakref.ref[Entry] | None = None

    def sent(self) -> None:
        """Make compute wait for the copies to the host, and let go of their sources.

        Raises:
            StateChangedError: a source was changed in place before its copy was over.
        """
        for copy in self._copies.values():
            if copy.out is not None:
                ticket, copy.out = copy.out, None
                if not ticket.release():
                    raise StateChangedError(
                        "the input or an attention result of a block was changed in place while it was copied to the "
                        "host: change a copy of it, or keep this block on the device"
                    )

    def fetch(self) -> None:
        """Start the copies back, once."""
        self.sent()
        for copy in self._copies.values():
            if copy.target is None:
                # Allocated on the compute stream, which owns it; the copy stream only writes once.
                memory = torch.empty(copy.memory().numel(), dtype=copy.dtype, device=self._swap.device)
                copy.back = self._swap.transfer.to_device(copy.memory(), memory.view(1, -1, 1))
                copy.target = memory.as_strided(copy.shape, copy.stride)
                self._swap.bytes_to_device += memory.numel() * memory.element_size()

    def take(self) -> dict[int, torch.Tensor]:
        """The tensors, on the device; starts the fetch of the block below. The entry is empty afterwards."""
        self._swap.backward_started()
        self.fetch()
        lower = self.lower() if self.lower is not None else None
        if lower is not None:
            lower.fetch()
        found = {}
        for place, copy in self._copies.items():
            assert copy.target is not None, "the copy was fetched"
            if copy.back is not None:
                copy.back.wait()
            found[place] = copy.target
        self._copies.clear()
        return found


class TiledSwap:
    """Host memory and copies of the blocks of one model.

    Args:
        device: where the blocks compute.
        pool: host memory; its limit is the budget.
        transfer: copies.
    """

    def __init__(self, device: torch.device, pool: HostPool, transfer: CopyEngine) -> None:
        self.device = device
        self.pool = pool
        self.transfer = transfer
        self.bytes_to_host = 0
        self.bytes_to_device = 0
        self._last: weakref.ref[Entry] | None = None
        self._in_flight: deque[weakref.ref[Entry]] = deque()

    def store(self, tensors: Mapping[int, torch.Tensor]) -> Entry:
        """Start the copies of one call to the host; an empty one still takes part in the order of blocks.

        Raises:
            HostLimitError: the host budget has no room; nothing was copied.
        """
        copies = {place: _Copy(one, self.pool.take(one.numel() * one.element_size())) for place, one in tensors.items()}
        entry = Entry(self, copies)
        self._release(keep=1)
        for place, one in tensors.items():
            flat = one.as_strided((one.numel(),), (1,)).view(1, -1, 1)
            copies[place].out = self.transfer.to_host(flat, copies[place].memory())
            self.bytes_to_host += one.numel() * one.element_size()
        entry.lower, self._last = self._last, weakref.ref(entry)
        self._in_flight.append(self._last)
        return entry

    def backward_started(self) -> None:
        """Some block of the step goes backward: no block above it follows any more."""
        self._last = None
        self._release(keep=0)

    def _release(self, keep: int) -> None:
        while len(self._in_flight) > keep:
            entry = self._in_flight.popleft()()
            if entry is not None:
                entry.sent()


def is_dense(tensor: torch.Tensor) -> bool:
    """Its elements fill one run of memory, each once, in some order of dimensions."""
    expected = 1
    for size, step in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size != 1 and step != expected:
            return False
        expected *= size
    return tensor.numel() > 0
