"""The host tier: slabs within a limit, and slots that go back when they are dropped.

When the system refuses memory that the limit allows (a cgroup, a driver that pins no more), the pool does what was
asked of it beforehand: keep nothing, or what there is. Either way an error says size, limit and knob.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

import torch

from memo_runtime.config import OnRefusal
from memo_runtime.errors import HostLimitError, PinningError
from memo_runtime.native.backend import Backend
from memo_runtime.native.limits import cgroup_limit
from memo_runtime.native.slab import Offset, Slab, no_offset
from memo_runtime.sizes import HOST_ALIGNMENT, slot_bytes
from memo_runtime.units import format_bytes, format_seconds

logger = logging.getLogger("memo_runtime")


class Slot:
    """A piece of host memory; dropping it gives it back.

    What used it has to be over by then for whoever takes it next: a copy's ticket was waited for or cancelled. Dropping
    it runs no Python code, in which an interrupt would be lost (``execution.ledger``): the pool takes note, and looks
    when it is asked for memory.
    """

    __slots__ = ("__weakref__", "memory", "size", "start")

    memory: torch.Tensor
    start: int
    size: int

    def place(self, slab: Slab, start: int, size: int, used: int) -> None:
        """It has ``size`` bytes of ``slab`` from ``start`` on, of which ``used`` were asked for."""
        self.start = start
        self.size = size
        self.memory = slab.memory[start : start + used]

    def typed(self, dtype: torch.dtype) -> torch.Tensor:
        """The slot as a flat tensor of ``dtype``."""
        return self.memory.view(dtype)


class _Place(weakref.ref[Slot]):
    """Where a slot is, told when it is dropped. It is there before the slot has memory, so that none can be lost."""

    __slots__ = ("slab", "where")
    slab: Slab
    where: Offset


def _nobody() -> None:
    """Nobody can do without what it has."""


class HostPool:
    """Host memory within ``limit`` bytes, pinned where the backend's device is a GPU.

    Args:
        limit: most bytes that may be reserved.
        backend: makes the slabs.
        on_refusal: whether ``reserve`` keeps what there is when the system refuses the rest.
    """

    def __init__(self, limit: int, backend: Backend, *, on_refusal: OnRefusal = OnRefusal.STOP) -> None:
        self.limit = limit
        self.on_refusal = on_refusal
        self._backend = backend
        self._slabs: list[Slab] = []
        self._lock = threading.RLock()
        #: Asked when there is no room, before that is an error; tells whether it has made some.
        self.when_short: Callable[[], Callable[[], bool] | None] = _nobody
        #: By identity: a weak reference is hashed as what it refers to.
        self._places: dict[int, _Place] = {}
        self._dropped: deque[weakref.ref[Slot]] = deque()

    @property
    def reserved(self) -> int:
        """Bytes of all slabs, to the slot: what is pinned on CUDA, but for the end of each slab's last page."""
        return sum(slab.size for slab in self._slabs)

    @property
    def pinned(self) -> int:
        """Bytes that are pinned, to the page."""
        return sum(slab.mapped for slab in self._slabs if slab.pinned)

    @property
    def in_use(self) -> int:
        """Bytes of the slots that are there."""
        with self._lock:
            self._settle()
            return sum(slab.in_use for slab in self._slabs)

    def reserve(self, size_bytes: int) -> None:
        """Make sure that the slabs hold ``size_bytes`` in all, before a step needs them.

        Raises:
            HostLimitError: the limit is lower; nothing was allocated.
            PinningError: the system refuses; nothing was allocated. With ``OnRefusal.GO_ON`` what there is is kept,
                ``limit`` becomes that, and so does the error's ``granted``.
        """
        with self._lock:
            missing = slot_bytes(size_bytes) - self.reserved
            if missing <= 0:
                return
            began = time.perf_counter()
            asked = format_bytes(self.limit)
            slab, why = self._grow(missing, partly=self.on_refusal is OnRefusal.GO_ON)
            if slab is not None and slab.pinned:
                seconds = format_seconds(time.perf_counter() - began)
                logger.info("memo: %s of host memory pinned in %s", format_bytes(slab.size), seconds)
            if why:
                self.limit = self.reserved
                raise PinningError(
                    f"{format_bytes(slot_bytes(size_bytes))} of host memory were asked for within host_budget, "
                    f"{asked}, and the system gives {format_bytes(self.reserved)}: {why}",
                    granted=self.reserved,
                )

    def refusal(self, size_bytes: int) -> str:
        """Why the system would not give what is missing of ``size_bytes``; "": nothing is known to stand against it."""
        with self._lock:
            missing = slot_bytes(size_bytes) - self.reserved
            return self._within_cgroup(missing)[1] if missing > 0 else ""

    def fit(self, size_bytes: int) -> None:
        """Like ``reserve``, for a plan that takes the place of another.

        What is there stays where it is enough: pinning memory anew takes longer than a short step, and lengths may
        change with every step. Where it is not, one slab of the new size replaces what is unused, so that a run of many
        lengths holds what its largest plan needs and no more.

        Raises:
            HostLimitError: as ``reserve``; what was unused was freed.
        """
        with self._lock:
            if not slot_bytes(size_bytes) <= self.reserved <= self.limit:
                self.trim()
            self.reserve(size_bytes)

    def take(self, size_bytes: int) -> Slot:
        """A slot of ``size_bytes``; a new slab where none has room.

        Raises:
            HostLimitError: the limit does not allow another slab, or the system does not (``PinningError``); nothing
                was changed.
        """
        size = slot_bytes(size_bytes)
        with self._lock:
            self._settle()
            slot = Slot()
            place = _Place(slot, self._dropped.append)
            place.where = no_offset()
            self._places[id(place)] = place
            if not self._found(place, size) and not (self._made_room(size) and self._found(place, size)):
                grown, _ = self._grow(size, partly=False)
                assert grown is not None, "a slab that is not there in part is there or an error"
                found = self._taken(place, grown, size)
                assert found, "a new slab has room for what it was made for"
            slot.place(place.slab, place.where.value, size, size_bytes)
            return slot

    def _found(self, place: _Place, size: int) -> bool:
        return any(self._taken(place, slab, size) for slab in self._slabs)

    def _made_room(self, size: int) -> bool:
        """Where another slab is out of the question, whoever can do without what it has gave it back."""
        ask = self.when_short()
        if self.reserved + size <= self.limit or ask is None or not ask():
            return False
        self._settle()
        return True

    def _taken(self, place: _Place, slab: Slab, size: int) -> bool:
        place.slab = slab
        return slab.take(size, HOST_ALIGNMENT, place.where)

    def trim(self) -> None:
        """Free the slabs of which nothing is in use."""
        with self._lock:
            self._settle()
            unused = [slab for slab in self._slabs if slab.in_use == 0]
            self._slabs = [slab for slab in self._slabs if slab.in_use > 0]
            for slab in unused:
                slab.close()

    def _settle(self) -> None:
        """Give back the slots that were dropped since the last time."""
        while self._dropped:
            # In this order: an interrupt between two of them is made good the next time.
            place = self._places.get(id(self._dropped[0]))
            if place is not None:
                if place.where.value >= 0:
                    place.slab.give(place.where)
                del self._places[id(place)]
            self._dropped.popleft()

    def _grow(self, size: int, *, partly: bool) -> tuple[Slab | None, str]:
        """A slab of ``size`` bytes, or with ``partly`` what there is of it and why it is not all."""
        if self.reserved + size > self.limit:
            raise HostLimitError(
                f"the step asks for {format_bytes(size)} of host memory beyond the {format_bytes(self.reserved)} that "
                f"are reserved ({format_bytes(self.in_use)} in use), and {format_bytes(self.limit)} is the limit. A "
                "plan counts one forward pass between two backward passes, of the lengths and tensors that it was "
                f"made for. Would work: host_budget of at least {format_bytes(self.reserved + size)}, going backward "
                "before the next forward, a larger keep_last, or policy='recompute'"
            )
        wanted, why = self._within_cgroup(size)
        if why and not partly:
            raise PinningError(self._refused(size, why))
        if wanted <= 0:
            return None, why
        try:
            slab = self._backend.slab(wanted, allow_partial=partly)
        except PinningError as error:
            if partly:
                return None, str(error)
            raise PinningError(self._refused(size, str(error))) from None
        self._slabs.append(slab)
        return slab, slab.refusal or why

    def _within_cgroup(self, size: int) -> tuple[int, str]:
        """``size``, or what a cgroup leaves of it: beyond that the kernel ends the process instead of saying no."""
        limit = cgroup_limit() if self._backend.device.type == "cuda" else None
        if limit is None or size <= limit.free:
            return size, ""
        left = f"{format_bytes(limit.free)} of {format_bytes(limit.total)} are left by {limit.source}"
        return limit.free // HOST_ALIGNMENT * HOST_ALIGNMENT, left

    def _refused(self, size: int, why: str) -> str:
        return (
            f"{format_bytes(size)} of host memory cannot be had besides the {format_bytes(self.reserved)} that are "
            f"reserved: {why}. The limit of this run is host_budget, {format_bytes(self.limit)}: lower it, raise "
            "what the system allows this process (its cgroup, or other programs' pinned memory), or give memo.wrap "
            "on_refusal='go_on' to plan for what there is"
        )
