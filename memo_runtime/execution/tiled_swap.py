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
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from memo_runtime.errors import StateChangedError, StepGivenUpError
from memo_runtime.execution.ledger import Ledger, Share
from memo_runtime.execution.tiled_chain import Input
from memo_runtime.execution.tiled_products import Departures, Products
from memo_runtime.native.engine import CopyEngine, Ticket
from memo_runtime.native.pool import HostPool, Slot


class _Copy:
    """One tensor on its way to the host and back."""

    def __init__(self, source: torch.Tensor, slot: Slot) -> None:
        self.shape = source.shape
        self.stride = source.stride()
        self.dtype = source.dtype
        self.size_bytes = source.numel() * source.element_size()
        self.slot = slot
        self.out: Ticket | None = None
        self.back: Ticket | None = None
        self.target: torch.Tensor | None = None

    def memory(self) -> torch.Tensor:
        """The host memory as [1, elements, 1], what transfers take."""
        return self.slot.typed(self.dtype).view(1, -1, 1)


class Entry:
    """What one call has in host memory, by place among the tensors that it stashes.

    ``share``: what is on the device: sources and what was fetched, and bytes of the stash and of products that stay
    there until the block's backward is over. Where the step is given up, it goes with the entry, and so do tickets.
    ``products``: those of tiles that were sent; the fetch of the block below then waits until they are back.
    ``made``: the call's input, if that is made again from what the block below has, which is then fetched with this.
    ``late``: nothing of it comes before the block goes backward, and nothing of other blocks with it.
    """

    def __init__(
        self, swap: TiledSwap, copies: Mapping[int, _Copy], share: Share, products: Products | None = None,
        made: Input | None = None, *, late: bool = False,
    ) -> None:  # fmt: skip
        self._swap = swap
        self._late = late
        self._products = products
        self._input = made
        self._copies = dict(copies)
        self._share = share
        self._given_up = False
        self.lower: weakref.ref[Any] | None = None

    def sent(self) -> None:
        """Make compute wait for the copies to the host, and let go of their sources.

        Raises:
            StateChangedError: a source was changed in place before its copy was over.
        """
        for copy in self._copies.values():
            if copy.out is not None:
                # In this order: where an interrupt cuts it off, it is waited for again.
                as_it_was = copy.out.release()
                copy.out = None
                self._share.hold(-copy.size_bytes)
                if not as_it_was:
                    raise StateChangedError(
                        "the input or an attention result of a block was changed in place while it was copied to the "
                        "host: change a copy of it, or keep this block on the device"
                    )
        if self._products is not None:
            self._products.sent()

    def fetch(self) -> None:
        """Start the copies back, once; where there are none, those of the next block below that has some."""
        if not self._late:
            self._fetch()

    def _fetch(self) -> None:
        self.sent()
        if self._late:
            self._bring()
            return
        lower = self._below()
        if self._input is not None:
            self._input.fetch()
        if not self._copies and lower is not None:
            lower.fetch()
        self._bring()

    def _bring(self) -> None:
        for copy in self._copies.values():
            if copy.target is None:
                # Allocated on the compute stream, which owns it; the copy stream only writes once.
                memory = torch.empty(copy.memory().numel(), dtype=copy.dtype, device=self._swap.device)
                copy.back = self._swap.transfer.to_device(copy.memory(), memory.view(1, -1, 1))
                copy.target = memory.as_strided(copy.shape, copy.stride)
                self._swap.counters.bytes_to_device += copy.size_bytes
                self._share.hold(copy.size_bytes)

    @property
    def landing_bytes(self) -> int:
        """Device bytes that a fetch takes."""
        if self._late:
            return 0
        lower = self._below()
        if not self._copies and lower is not None:
            return int(lower.landing_bytes)
        below = self._input.landing_bytes if self._input is not None else 0
        return below + sum(copy.size_bytes for copy in self._copies.values() if copy.target is None)

    def _below(self) -> Any:
        return self.lower() if self.lower is not None else None

    def take(self) -> dict[int, torch.Tensor]:
        """The tensors, on the device; starts the fetch of the block below, unless products come first.

        Raises:
            StepGivenUpError: their memory was needed for another step.
        """
        self.started()
        self._fetch()
        if self._products is None:
            self._fetch_lower()
        return self.landed()

    def started(self) -> None:
        """The block goes backward.

        Raises:
            StepGivenUpError: its memory was needed for another step.
        """
        self._refuse_given_up()
        self._swap.order.started(self)

    def _refuse_given_up(self) -> None:
        if self._given_up:
            raise StepGivenUpError(
                "a block is to go backward in a step that an exception ended, and its memory was needed for another "
                "one since. Would work: forward again, or a host_budget with room for both"
            )

    def landed(self) -> dict[int, torch.Tensor]:
        """The tensors, on the device, and nothing else is begun.

        Raises:
            StepGivenUpError: their memory was needed for another step.
        """
        self._refuse_given_up()
        self._fetch()
        found = {}
        for place, copy in self._copies.items():
            assert copy.target is not None, "the copy was fetched"
            if copy.back is not None:
                # In this order: where an interrupt cuts it off, it is waited for again.
                copy.back.release()
                copy.back = None
            found[place] = copy.target
        return found

    def fetch_below(self) -> None:
        """The block's products are back: start the fetch of the block below, where that had to wait for them."""
        if self._products is not None:
            self._fetch_lower()

    def fetch_products_below(self) -> None:
        """There is room: start the fetch of the products that the block below begins with."""
        lower = self._below()
        if isinstance(lower, Entry) and lower._products is not None:
            lower._products.fetch_first()

    def _fetch_lower(self) -> None:
        lower = self._below()
        if self._copies and lower is not None and not self._late:
            lower.fetch()

    def give_back(self) -> None:
        """An exception ended the step, and somebody keeps its graph: free everything. It goes backward no more."""
        self._given_up = True
        self.sent()
        self.done(retain=False)

    def done(self, *, retain: bool) -> None:
        """Backward is over: what it fetched goes, and host memory too unless another backward is to come."""
        self.leave()
        if self._input is not None:
            self._input.done(retain=retain)
        if self._products is not None:
            self._products.done(retain=retain)
        if not retain:
            self._copies.clear()
            self._share.clear()


    def leave(self) -> None:
        """What was fetched goes from the device, and can be fetched again."""
        for copy in self._copies.values():
            if copy.target is not None:
                copy.target = None
                self._share.hold(-copy.size_bytes)


class Order(Protocol):
    """Who goes after whom: knows the entry below each. ``departures``: products of all of them under way."""

    departures: Departures

    def stored(self, entry: Entry) -> None:
        """A block has finished its forward, and its copies are under way."""
        ...

    def started(self, entry: Entry) -> None:
        """A block starts its backward."""
        ...


class CallOrder:
    """Blocks in the order of their calls, where nobody else keeps one."""

    def __init__(self) -> None:
        self._last: weakref.ref[Entry] | None = None
        self._in_flight: deque[weakref.ref[Entry]] = deque()
        self.departures = Departures()

    def stored(self, entry: Entry) -> None:
        """See ``Order``."""
        self._release(keep=1)
        entry.lower, self._last = self._last, weakref.ref(entry)
        self._in_flight.append(self._last)

    def started(self, entry: Entry) -> None:
        """Some block of the step goes backward: no block above it follows any more."""
        self._last = None
        self._release(keep=0)

    def _release(self, keep: int) -> None:
        while len(self._in_flight) > keep:
            entry = self._in_flight.popleft()()
            if entry is not None:
                entry.sent()


@dataclass(slots=True)
class Moved:
    """Bytes copied each way."""

    bytes_to_host: int = 0
    bytes_to_device: int = 0


class Moving(Protocol):
    """Where copies are counted."""

    bytes_to_host: int
    bytes_to_device: int


class TiledSwap:
    """Host memory and copies of the blocks of one model.

    Args:
        device: where the blocks compute.
        pool: host memory; its limit is the budget.
        transfer: copies.
        order: of the blocks. counters: of the bytes. ledger: of what is held on the device.
    """

    def __init__(
        self,
        device: torch.device,
        pool: HostPool,
        transfer: CopyEngine,
        *,
        order: Order | None = None,
        counters: Moving | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.device = device
        self.pool = pool
        self.transfer = transfer
        self.order = order if order is not None else CallOrder()
        self.counters = counters if counters is not None else Moved()
        self.ledger = ledger if ledger is not None else Ledger()

    def store(
        self,
        tensors: Mapping[int, torch.Tensor],
        *,
        kept: int = 0,
        products: Products | None = None,
        made: Input | None = None,
        late: bool = False,
    ) -> Entry:
        """Start the copies of one call to the host; an empty one still takes part in the order of blocks.

        Args:
            tensors: what is copied. kept: bytes that stay on the device beside it. products: that were sent before.
            made: the input, where it is made again. late: what is copied comes back when the block goes backward.

        Raises:
            HostLimitError: the host budget has no room; nothing was copied.
        """
        copies = {place: _Copy(one, self.pool.take(one.numel() * one.element_size())) for place, one in tensors.items()}
        share = Share(self.ledger)
        share.hold(kept + sum(copy.size_bytes for copy in copies.values()))
        if made is not None:
            # Here it is still the caller's.
            made.share = Share(self.ledger)
            made.share.hold(made.size_bytes)
            made.share.clear()
        for place, one in tensors.items():
            flat = one.as_strided((one.numel(),), (1,)).view(1, -1, 1)
            copies[place].out = self.transfer.to_host(flat, copies[place].memory())
            self.counters.bytes_to_host += copies[place].size_bytes
        entry = Entry(self, copies, share, products, made, late=late)
        if self.device.type == "cpu":
            entry.sent()  # nothing to gain from waiting later: the caller's cores make the copies
        self.order.stored(entry)
        return entry
