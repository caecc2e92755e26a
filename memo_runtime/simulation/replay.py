"""Replaying a trace on the simulated allocator."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from memo_runtime.simulation.blocks import Block
from memo_runtime.simulation.caching_allocator import CachingAllocator, OutOfDeviceMemoryError
from memo_runtime.traces.trace import Trace

#: Stands for the arena where the index of a request is expected.
ARENA = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What the allocator held while it served a trace, in bytes.

    Attributes:
        allocated_peak, reserved_peak: of blocks in use and of segments, as ``torch.cuda.memory_stats`` counts them.
        retries: how often all cached memory went back because the device was full; ``device_allocations`` and
            ``device_frees`` how often it was asked and given back to.
        failed: index of the request that found no memory at all, ``ARENA`` for the arena; None where all were served.
    """

    allocated_peak: int
    reserved_peak: int
    retries: int
    device_allocations: int
    device_frees: int
    num_segments: int
    failed: int | None = None


def simulate(
    trace: Trace,
    *,
    expandable: bool | None = None,
    capacity: int | None = None,
    collection: float = 0.0,
    arena_bytes: int = 0,
    placed: Container[int] = (),
) -> Simulation:
    """Replay ``trace``.

    Args:
        trace: what is replayed, from an empty allocator on.
        expandable: with expandable segments; None: as the trace was recorded.
        capacity: most bytes that may be reserved; None: unbounded. collection: the allocator's
            ``garbage_collection_threshold``, a share of it.
        arena_bytes: one block of that size is taken first and held throughout; the requests whose indices are in
            ``placed`` live in it and do not meet the allocator.
    """
    chosen = trace.expandable if expandable is None else expandable
    # Another allocator, or one that holds an arena, asks the device for other things.
    as_recorded = chosen == trace.expandable and not arena_bytes and not collection
    allocator = CachingAllocator(
        expandable=chosen,
        capacity=capacity,
        collection=collection,
        segments=trace.segments if as_recorded else (),
    )
    failed = _replay(trace, allocator, arena_bytes, placed)
    counters = allocator.counters
    return Simulation(
        allocated_peak=counters.allocated_peak,
        reserved_peak=counters.reserved_peak,
        retries=counters.retries,
        device_allocations=counters.device_allocations,
        device_frees=counters.device_frees,
        num_segments=allocator.num_segments,
        failed=failed,
    )


def _replay(trace: Trace, allocator: CachingAllocator, arena_bytes: int, placed: Container[int]) -> int | None:
    """Serve everything; the index of the request that could not be served."""
    blocks: dict[int, Block] = {}
    releases = set(trace.releases)
    index = ARENA
    try:
        if arena_bytes:
            allocator.allocate(arena_bytes)
        for tick, (index, allocates) in enumerate(trace.events()):
            request = trace.requests[index]
            if tick in releases:
                allocator.release_cached()
            # PyTorch never asks its allocator for nothing.
            if index in placed or not request.size:
                continue
            if allocates:
                blocks[index] = allocator.allocate(request.size, request.stream)
            else:
                allocator.free(blocks.pop(index))
    except OutOfDeviceMemoryError:
        return index
    return None
