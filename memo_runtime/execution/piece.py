"""One group of bytes of one block between its forward and its backward.

A piece is stored when the block's forward ends (its rows go to the host, stay, or are dropped), fetched before the
block's backward (into a buffer of full size, so that rebuilt rows are written behind the fetched ones and nothing
is concatenated), and freed on the device when the last node that needs it has run. For that the nodes own what is on
the device: the piece itself only knows it. No destructor in Python takes part (``execution.ledger`` says why).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol

import torch

from memo_runtime.blocks.grouping import whole
from memo_runtime.blocks.region import Region, View
from memo_runtime.execution.ledger import Ledger, Share
from memo_runtime.native.engine import Pair
from memo_runtime.native.pool import HostPool, Slot
from memo_runtime.records import Action


class Landed:
    """What a piece has on the device for backward: the buffer of what was fetched, or what a rerun made."""

    __slots__ = ("__weakref__", "buffer", "rebuilt", "share", "written")

    def __init__(self, ledger: Ledger) -> None:
        self.buffer: torch.Tensor | None = None
        self.rebuilt: dict[int, torch.Tensor] = {}
        self.written: set[tuple[object, ...]] = set()
        self.share = Share(ledger)


class User(Protocol):
    """One saved tensor of a piece, for as long as it may be asked for; owns what has landed."""

    landed: Landed | None


class Piece:
    """A group's bytes."""

    __slots__ = (
        "_device_rows",
        "_landed",
        "_ledger",
        "_nobodys",
        "_share",
        "_slot",
        "_users",
        "action",
        "bytes_in",
        "bytes_kept",
        "bytes_out",
        "dtype",
        "exact",
        "indices",
        "lost",
        "modified",
        "prefix",
        "region",
        "rows",
        "size_bytes",
    )

    def __init__(self, action: Action, ledger: Ledger, size_bytes: int) -> None:
        self.action = action
        self.size_bytes = size_bytes
        self.indices: list[int] = []
        self.region: Region | None = None
        self.rows = (0, 0)
        self.prefix = 0
        self.dtype = torch.uint8
        self.modified = False
        #: Why its copy to the host was not made; empty where it was.
        self.lost = ""
        #: Nothing is rebuilt: every tensor comes back with the strides that it had, so that kernels give the same bits.
        self.exact = False
        self.bytes_out = 0
        self.bytes_in = 0
        self.bytes_kept = 0
        self._ledger = ledger
        self._share = Share(ledger)
        self._slot: Slot | None = None
        self._device_rows: torch.Tensor | None = None
        self._users: list[Callable[[], User | None]] = []
        self._landed: weakref.ref[Landed] | None = None
        #: What has landed where no saved tensor owns it: only a rerun reads it.
        self._nobodys: Landed | None = None

    def add_user(self, index: int, user: Callable[[], User | None]) -> None:
        """Saved tensor ``index`` lies here."""
        self.indices.append(index)
        self._users.append(user)

    @property
    def users(self) -> int:
        """How many saved tensors still may be asked for."""
        return sum(user() is not None for user in self._users)

    # ---- forward

    def store(self, region: Region, flat: torch.Tensor, prefix: int, device_rows: int, pool: HostPool) -> None:
        """Decide which rows of ``region`` are stashed and take host memory for them; ``flat`` holds its elements.

        Raises:
            HostLimitError: the pool has no room.
        """
        self.dtype = flat.dtype
        self.prefix = prefix
        if self.action == Action.HOST:
            region = whole(region)
            self.rows = (0, 1)
        elif self.action == Action.PREFIX:
            self.rows = (device_rows, prefix)
            if device_rows:
                self._device_rows = region.rows(flat, 0, device_rows).clone()
                self.bytes_kept = self._device_rows.numel() * flat.element_size()
                self._share.hold(self.bytes_kept)
        else:
            assert self.action == Action.TAIL, f"{self.action} stores nothing"
            self.rows = (prefix, region.tokens)
        self.region = region
        start, stop = self.rows
        self.bytes_out = region.outer * (stop - start) * region.inner * flat.element_size()
        if self.bytes_out:
            self._slot = pool.take(self.bytes_out)

    def outgoing(self, flat: torch.Tensor) -> Pair | None:
        """The copy to the host that ``store`` decided on; None where nothing goes there."""
        if self._slot is None or self.region is None:
            return None
        # A view that conjugates or negates what lies in memory: the engine copies memory, not what is meant.
        meant = self.region.rows(flat, *self.rows).resolve_conj().resolve_neg()
        return meant, self._host_rows()

    @property
    def label(self) -> str:
        """Which of the block's tensors it is, for errors."""
        return f"saved tensor {self.indices[0]}" if self.indices else "input or result of an operator"

    def _host_rows(self) -> torch.Tensor:
        assert self._slot is not None and self.region is not None, "the piece was stored"
        start, stop = self.rows
        return self._slot.typed(self.dtype).view(self.region.outer, stop - start, self.region.inner)

    # ---- backward

    @property
    def _buffer(self) -> torch.Tensor | None:
        landed = self._landed() if self._landed is not None else None
        return landed.buffer if landed is not None else None

    @property
    def present(self) -> bool:
        """The piece's buffer is on the device."""
        return self._buffer is not None

    def rebuilt(self, index: int) -> torch.Tensor | None:
        """What a rerun made for saved tensor ``index``."""
        landed = self._landed() if self._landed is not None else None
        return landed.rebuilt.get(index) if landed is not None else None

    @property
    def landing_bytes(self) -> int:
        """Device bytes that ``land`` would take."""
        if self.region is None or self._buffer is not None:
            return 0
        start, stop = self.rows
        tokens = stop - start if self.action == Action.TAIL else self.region.tokens
        return self.region.outer * tokens * self.region.inner * self.dtype.itemsize

    @property
    def full_bytes(self) -> int:
        """Device bytes that it takes in backward, fetched or rebuilt."""
        return self.landing_bytes or self.held_bytes or (self.size_bytes if self.action == Action.REBUILD else 0)

    @property
    def held_bytes(self) -> int:
        """Device bytes that it holds for backward."""
        landed = self._landed() if self._landed is not None else None
        return landed.share.count if landed is not None else 0

    def land(self, device: torch.device) -> Pair | None:
        """Make the buffer on the device; returns the copy that fills it, None where no copy has to."""
        if self.region is None or self._buffer is not None:
            return None
        start, stop = self.rows
        if self.action == Action.TAIL:
            self.region_of_tail()
        # Allocated on the compute stream: that stream owns it, the copy stream only writes once.
        landed = self._make_landed()
        landed.buffer = torch.empty(self.region.numel, dtype=self.dtype, device=device)
        landed.share.hold(landed.buffer.numel() * landed.buffer.element_size())
        if self._device_rows is not None:
            self.region.rows(landed.buffer, 0, self._device_rows.shape[1]).copy_(self._device_rows)
        self.bytes_in = self.bytes_out
        if self._slot is None:
            return None
        first, last = (0, stop - start) if self.action == Action.TAIL else (start, stop)
        return self._host_rows(), self.region.rows(landed.buffer, first, last)

    def _make_landed(self) -> Landed:
        """A place on the device that whoever may ask for something owns, or nobody but the piece."""
        landed = Landed(self._ledger)
        self._landed = weakref.ref(landed)
        users = [user for entry in self._users if (user := entry()) is not None]
        for user in users:
            user.landed = landed
        self._nobodys = None if users else landed
        return landed

    def region_of_tail(self) -> None:
        """Make the region that of the stashed tail alone, once."""
        assert self.region is not None, "the piece was stored"
        start, stop = self.rows
        if self.region.tokens != stop - start:
            self.region = self.region.cut(start, stop)

    def view(self, position: int) -> torch.Tensor:
        """View number ``position`` of the region over the buffer."""
        assert self._buffer is not None and self.region is not None, "the piece was fetched"
        view = self.region.views[position]
        return view.as_it_was(self._buffer) if self.exact else view.of(self._buffer)

    def as_it_was(self, position: int) -> torch.Tensor:
        """The same with the strides that it had when it was stored."""
        assert self._buffer is not None and self.region is not None, "the piece was fetched"
        return self.region.views[position].as_it_was(self._buffer)

    def original_stride(self, position: int) -> tuple[int, ...]:
        """The strides that view number ``position`` had when it was stored."""
        assert self.region is not None, "the piece was stored"
        return self.region.views[position].original_stride

    def write_tail(self, position: int, tail: torch.Tensor, tokens: int) -> None:
        """Write rebuilt rows [prefix, tokens) of view ``position`` behind the fetched ones; equal views once."""
        landed = self._landed() if self._landed is not None else None
        assert self.region is not None and landed is not None and landed.buffer is not None, "the piece was fetched"
        view: View = self.region.views[position]
        axis = view.axis
        assert axis is not None, "only pieces with a token axis have a tail"
        key = (view.offset, view.size, view.stride)
        if key in landed.written:
            return
        landed.written.add(key)
        count = tokens - self.prefix
        target = view.of(landed.buffer)
        for dim, step in enumerate(view.stride):
            if step == 0 and view.size[dim] > 1:  # expanded: one element stands for all
                target, tail = target.narrow(dim, 0, 1), tail.narrow(dim, 0, 1)
        target = target.unflatten(axis.dim, (axis.outer, tokens, axis.inner))
        source = tail.unflatten(axis.dim, (axis.outer, count, axis.inner))
        target.narrow(axis.dim + 1, self.prefix, count).copy_(source)

    def rebuild(self, index: int, tensor: torch.Tensor) -> None:
        """Keep what the rerun made for saved tensor ``index``."""
        landed = self._landed() if self._landed is not None else None
        if landed is None:
            landed = self._make_landed()
        if not landed.rebuilt:
            landed.share.hold(self.size_bytes)
        landed.rebuilt[index] = tensor

    # ---- freeing

    def give_back(self) -> None:
        """Free what was stashed too."""
        self.drop_buffer()
        self._slot = self._device_rows = None
        self._share.clear()

    def drop_buffer(self) -> None:
        """Free what is on the device for backward; the stashed rows stay and can be fetched again."""
        for entry in self._users:
            user = entry()
            if user is not None:
                user.landed = None
        self._landed = self._nobodys = None
