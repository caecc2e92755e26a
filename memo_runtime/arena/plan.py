"""Addresses for one step of this process on one device, checked before anything is enabled."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from memo_runtime.allocator.library import NATIVE, Bounds, PlannedAllocator, Slot
from memo_runtime.arena.compaction import compact
from memo_runtime.errors import AllocatorPlanError
from memo_runtime.placement import PlacedRequest
from memo_runtime.planning.layout import layout_fault, plan_layout
from memo_runtime.traces.trace import Trace
from memo_runtime.traces.windows import is_within, last_step
from memo_runtime.units import format_bytes

logger = logging.getLogger("memo_runtime")

_MOST = 2**64 - 1
#: Bytes of the largest small request; PyTorch's allocator keeps those in segments of their own too.
SMALL = 1 << 20


class Placed(Protocol):
    """What of ``planning.layout.Layout`` is needed."""

    @property
    def rows(self) -> tuple[PlacedRequest, ...]:
        """Every planned request."""

    @property
    def placed(self) -> tuple[int, ...]:
        """Its index in the trace."""

    @property
    def peak(self) -> int:
        """Bytes of the arena."""

    @property
    def lower_bound(self) -> int:
        """No arena in which streams keep apart is smaller."""

    @property
    def resident_bytes(self) -> int:
        """Most bytes of the step that outlive it."""

    @property
    def seconds(self) -> float:
        """That planning took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaPlan:
    """Where every request lives that a step makes and frees again.

    Attributes:
        rows: the requests, in the step's own ticks. streams: of each, the CUDA handle of its stream.
        residents: (tick, size, handle) of what the step makes and leaves behind, which stays with PyTorch's allocator.
        size: bytes of the arena. lower_bound: no arena in which streams keep apart is smaller. resident_bytes: most
            bytes of the step that outlive it, which stay with PyTorch's allocator.
        planned_bytes: of all rows together; step_bytes: of everything that the recorded step asked for.
        device: its index, and ``device_name`` what it is. torch: the version. process: handles of streams mean nothing
            in another one.
        seconds: that planning took.
        bounds: of each row, the least and the most bytes that it may have, for which there is room; none where all
            sizes are certain.
        places: of each row, the place that it lies in, of a layout that serves several lengths; none where the rows
            are the layout.
    """

    rows: tuple[PlacedRequest, ...]
    streams: tuple[int, ...]
    residents: tuple[tuple[int, int, int], ...]
    size: int
    lower_bound: int
    resident_bytes: int
    planned_bytes: int
    step_bytes: int
    device: int
    device_name: str
    torch: str
    process: int
    seconds: float
    bounds: tuple[Bounds, ...] = ()
    places: tuple[PlacedRequest, ...] = ()

    def _ordered(self) -> list[tuple[Slot, int | None]]:
        """Slots, and which row each is; None: it outlives the step."""
        pairs = enumerate(zip(self.rows, self.streams, strict=True))
        placed = [((row.lower, row.upper, row.size, row.offset, stream), at) for at, (row, stream) in pairs]
        residents = [((tick, tick + 1, size, NATIVE, stream), None) for tick, size, stream in self.residents]
        return sorted([*placed, *residents], key=lambda one: one[0])

    def slots(self) -> list[Slot]:
        """As the allocator takes them."""
        return [slot for slot, _ in self._ordered()]

    def order(self) -> list[int | None]:
        """Which row each slot is; None: it outlives the step."""
        return [row for _, row in self._ordered()]

    def slot_bounds(self) -> list[Bounds] | None:
        """Least and most bytes of each slot; None where all sizes are certain."""
        if not self.bounds:
            return None
        return [(slot[2], slot[2]) if row is None else self.bounds[row] for slot, row in self._ordered()]


def plan_arena(
    trace: Trace, handles: tuple[int, ...], device: int, *, seconds: float, threads: int | None
) -> ArenaPlan:
    """Place the last step of ``trace``, whose stream i has the CUDA handle ``handles[i]``.

    Raises:
        AllocatorPlanError: the step makes nothing that it frees again. TraceError: no step is marked.
    """
    return as_arena_plan(plan_layout(by_size(trace), seconds=seconds, threads=threads), trace, handles, device)


def by_size(trace: Trace) -> Trace:
    """``trace`` with a stream of its own for the small requests of each stream, so that layouts keep them apart.

    A small tensor that somebody holds for longer than planned, such as a loss, then never sits where large ones belong.
    """
    requests = tuple(replace(r, stream=2 * r.stream + (r.size <= SMALL)) for r in trace.requests)
    return replace(trace, requests=requests)


def as_arena_plan(layout: Placed, trace: Trace, handles: tuple[int, ...], device: int) -> ArenaPlan:
    """``layout`` of the last step of ``trace`` for this process.

    Raises:
        AllocatorPlanError: it places nothing.
    """
    if not layout.rows:
        raise AllocatorPlanError("the recorded step makes nothing that it frees again: there is nothing to place")
    window = last_step(trace)
    made = [r for r in trace.requests if window.lower <= r.lower < window.upper]
    return ArenaPlan(
        rows=layout.rows,
        streams=tuple(handles[trace.requests[index].stream] for index in layout.placed),
        residents=tuple(
            (r.lower - window.lower, r.size, handles[r.stream]) for r in made if r.size and not is_within(r, window)
        ),
        size=layout.peak,
        lower_bound=layout.lower_bound,
        resident_bytes=layout.resident_bytes,
        planned_bytes=sum(row.size for row in layout.rows),
        step_bytes=sum(r.size for r in made),
        device=device,
        device_name=torch.cuda.get_device_properties(device).name,
        torch=torch.__version__,
        process=os.getpid(),
        seconds=layout.seconds,
    )


def check_arena_plan(plan: ArenaPlan) -> None:
    """Raise where ``plan`` cannot be enabled here and now.

    Raises:
        AllocatorPlanError: it is another process's, device's or torch's, its rows overlap or leave the arena, or the
            device has no memory for it (says how much is missing).
    """
    if plan.process != os.getpid():
        raise AllocatorPlanError(
            "the plan was made in another process: its streams are not those of this one; record a step here"
        )
    if plan.torch != torch.__version__:
        raise AllocatorPlanError(f"the plan was made with torch {plan.torch}, and {torch.__version__} is running")
    if plan.device >= torch.cuda.device_count():
        raise AllocatorPlanError(f"the plan is for device {plan.device}; there are {torch.cuda.device_count()}")
    name = torch.cuda.get_device_properties(plan.device).name
    if plan.device_name != name:
        raise AllocatorPlanError(f"the plan was made on '{plan.device_name}', and device {plan.device} is '{name}'")
    if len(plan.streams) != len(plan.rows):
        raise AllocatorPlanError(f"the plan has {len(plan.rows)} requests and the streams of {len(plan.streams)}")
    numbers = (*plan.streams, *(number for resident in plan.residents for number in resident))
    if not all(isinstance(number, int) and 0 <= number <= _MOST for number in numbers):
        raise AllocatorPlanError("a stream of the plan, or a tensor that outlives the step, is no number of 64 bits")
    if not (plan.rows and plan.planned_bytes == sum(row.size for row in plan.rows) <= plan.step_bytes):
        raise AllocatorPlanError(
            f"the plan says {plan.planned_bytes} planned bytes of {plan.step_bytes}, and its {len(plan.rows)} requests "
            "have another sum"
        )
    rows = plan.rows
    if plan.bounds:
        if len(plan.bounds) != len(rows):
            raise AllocatorPlanError(f"the plan has {len(rows)} requests and the bounds of {len(plan.bounds)}")
        both = list(zip(rows, plan.bounds, strict=True))
        if not all(0 < least <= row.size <= most <= _MOST for row, (least, most) in both):
            raise AllocatorPlanError("a size of the plan is not between its bounds")
        if not plan.places:
            rows = tuple(row if row.size == most else replace(row, size=most) for row, (_, most) in both)
    if plan.places:
        _check_places(plan)
        rows = plan.places
    fault = _fault(rows, plan.size)
    if fault is not None:
        raise AllocatorPlanError(f"the plan cannot be: {fault}")


def _check_places(plan: ArenaPlan) -> None:
    if len(plan.places) != len(plan.rows):
        raise AllocatorPlanError(f"the plan has {len(plan.rows)} requests and places for {len(plan.places)}")
    most = [most for _, most in plan.bounds] or [row.size for row in plan.rows]
    for row, place, size in zip(plan.rows, plan.places, most, strict=True):
        if (row.offset, row.lower, row.upper) != (place.offset, place.lower, place.upper) or size > place.size:
            raise AllocatorPlanError(f"request '{row.id}' of the plan, of {size} bytes at most, leaves its place")


#: Layouts without a fault, and the bytes of their arenas. One serves steps of many lengths, each of which has a plan.
_faultless: deque[tuple[tuple[PlacedRequest, ...], int]] = deque(maxlen=16)


def _fault(rows: tuple[PlacedRequest, ...], size: int) -> str | None:
    if any(known is rows and there == size for known, there in _faultless):
        return None
    fault = layout_fault(rows, size)
    if fault is None:
        _faultless.append((rows, size))
    return fault


def allowed_bytes(device: int) -> int:
    """What this process may reserve: what the allocator was told to keep to is a share of the whole."""
    _, total = torch.cuda.mem_get_info(device)
    return int(torch.cuda.get_per_process_memory_fraction(device) * total)


def check_memory(plan: ArenaPlan, arena_bytes: int) -> None:
    """Raise where the device lacks the memory for ``plan``; ``arena_bytes``: of an arena that is there already.

    Raises:
        AllocatorPlanError: says by how much.
    """
    if plan.size <= arena_bytes:
        return
    free, _ = torch.cuda.mem_get_info(plan.device)
    reserved = torch.cuda.memory_reserved(plan.device)
    there = min(free, allowed_bytes(plan.device) - reserved)
    if plan.size > there:
        raise AllocatorPlanError(
            f"the plan needs an arena of {format_bytes(plan.size)} and the device has {format_bytes(max(there, 0))} "
            f"left for it, {format_bytes(plan.size - max(there, 0))} too little, with {format_bytes(reserved)} in use "
            "by this process: give memo.wrap a smaller budget, or free what is not needed"
        )


def enable(
    allocator: PlannedAllocator, plan: ArenaPlan, long_lived: Callable[[], Iterable[torch.Tensor]] = tuple
) -> None:
    """Check ``plan``, give cached memory back where its arena has to be made, and serve it from the next step on.

    Args:
        long_lived: tensors that outlive the step, which are moved together before the arena is made.

    Raises:
        AllocatorPlanError: it cannot be enabled; nothing is planned then.
    """
    check_arena_plan(plan)
    has = allocator.statistics(plan.device).arena_bytes
    if plan.size > has:
        # What is cached is in the way of the arena, and of no use beside it.
        allocator.disarm(plan.device)
        torch.cuda.empty_cache()
        given = compact(long_lived(), plan.device)
        logger.info("memo: long-lived tensors were moved together: %s less reserved", format_bytes(given))
        has = 0
    check_memory(plan, has)
    allocator.arm(plan.device, plan.slots(), plan.size, plan.slot_bounds())
