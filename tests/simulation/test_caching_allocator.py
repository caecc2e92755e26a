"""The rules one by one, and against the same rules written down in another way."""

import itertools
import random

import pytest

from memo_runtime.simulation.caching_allocator import CachingAllocator, OutOfDeviceMemoryError
from memo_runtime.simulation.replay import ARENA, simulate
from memo_runtime.traces.trace import TraceBuilder
from tests.simulation.plain_allocator import KIB, MIB, plain_peaks
from tests.traces.samples import random_trace


@pytest.mark.parametrize(
    ("request_bytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),  # large, and what is left of 20 MiB is split off
        (10 * MIB - 1, 10 * MIB, 10 * MIB),  # rounded to 10 MiB before it is looked at
        (9 * MIB, 9 * MIB, 20 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # 1 MiB is not split off
        (int(10.5 * MIB), 12 * MIB - int(1.5 * MIB), 12 * MIB),  # 1.5 MiB is
    ],
)
def test_rounding_and_segments(request_bytes, allocated, reserved):
    allocator = CachingAllocator()
    allocator.allocate(request_bytes)
    assert allocator.counters.allocated == allocated
    assert allocator.counters.reserved == reserved


def test_the_smallest_block_that_is_large_enough_at_the_lowest_address():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MIB) for size in (30, 20, 40, 20)]
    for block in blocks:
        allocator.free(block)
    # Addresses that are made up fall: the last segment is the lowest.
    assert allocator.allocate(18 * MIB).start == blocks[3].start
    assert allocator.allocate(18 * MIB).start == blocks[1].start
    assert allocator.allocate(18 * MIB).start == blocks[0].start
    assert allocator.counters.reserved == 110 * MIB


def test_free_neighbours_are_joined():
    allocator = CachingAllocator()
    parts = [allocator.allocate(5 * MIB) for _ in range(4)]
    assert allocator.counters.reserved == 20 * MIB
    for part in (parts[0], parts[2], parts[1], parts[3]):
        allocator.free(part)
    allocator.allocate(20 * MIB)
    assert allocator.counters.reserved == 20 * MIB


def test_streams_and_pools_do_not_share():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(20 * MIB, stream=0))
    allocator.allocate(20 * MIB, stream=1)
    allocator.allocate(KIB, stream=0)
    assert allocator.counters.reserved == 42 * MIB


def test_a_full_device_gets_the_cache_back_and_is_asked_again():
    allocator = CachingAllocator(capacity=100 * MIB)
    kept = allocator.allocate(40 * MIB)
    allocator.free(allocator.allocate(40 * MIB))
    allocator.allocate(60 * MIB)
    assert allocator.counters.retries == 1
    assert allocator.counters.reserved == 100 * MIB
    allocator.free(kept)
    with pytest.raises(OutOfDeviceMemoryError):
        allocator.allocate(41 * MIB)  # no longer split, but 60 of 100 are in use


@pytest.mark.parametrize(
    ("collection", "reserved"),
    [
        (0.0, 94),  # nothing is collected
        (0.7, 94),  # 64 are no more than 70
        (0.5, 74),  # 14 too many: what was free for longest goes, 20
        (0.41, 50),  # 23 too many: both go
    ],
)
def test_above_a_threshold_old_segments_go_back_before_the_device_is_asked(collection, reserved):
    allocator = CachingAllocator(capacity=100 * MIB, collection=collection)
    old, _ = allocator.allocate(20 * MIB), allocator.allocate(20 * MIB)
    allocator.free(old)
    young = allocator.allocate(24 * MIB)
    allocator.free(young)
    assert allocator.counters.reserved == 64 * MIB
    allocator.allocate(30 * MIB)
    assert allocator.counters.reserved == reserved * MIB
    assert allocator.counters.retries == 0


def test_expandable_segments_and_small_ones_are_not_collected():
    for expandable, size in ((True, 30 * MIB), (False, KIB)):
        allocator = CachingAllocator(capacity=100 * MIB, collection=0.01, expandable=expandable)
        allocator.free(allocator.allocate(size))
        before = allocator.counters.reserved
        allocator.allocate(size, stream=1)
        assert allocator.counters.reserved == 2 * before


def test_a_segment_with_anything_in_use_stays():
    allocator = CachingAllocator()
    first, second = allocator.allocate(5 * MIB), allocator.allocate(5 * MIB)
    allocator.free(first)
    allocator.release_cached()
    assert allocator.counters.reserved == 20 * MIB
    allocator.free(second)
    allocator.release_cached()
    assert allocator.counters.reserved == 0


def test_an_expandable_segment_grows_at_its_end():
    allocator = CachingAllocator(expandable=True)
    allocator.allocate(30 * MIB)  # two pieces of 20 MiB
    assert allocator.counters.reserved == 40 * MIB
    last = allocator.allocate(30 * MIB)  # 10 MiB were left, one more piece
    assert allocator.counters.reserved == 60 * MIB
    allocator.free(last)
    allocator.allocate(50 * MIB)  # what is free at the end grows
    assert allocator.counters.reserved == 80 * MIB
    assert allocator.num_segments == 1


def test_an_expandable_segment_gives_back_whole_pieces():
    allocator = CachingAllocator(expandable=True)
    kept = allocator.allocate(30 * MIB)
    allocator.free(allocator.allocate(70 * MIB))
    assert allocator.counters.reserved == 100 * MIB
    allocator.release_cached()
    assert allocator.counters.reserved == 40 * MIB
    allocator.free(kept)
    allocator.release_cached()
    assert allocator.counters.reserved == 0
    allocator.allocate(100 * MIB)
    assert allocator.counters.reserved == 100 * MIB


def test_small_rests_are_split_off_in_expandable_segments():
    for expandable, allocated in ((False, 12 * MIB), (True, 11 * MIB)):
        allocator = CachingAllocator(expandable=expandable)
        allocator.allocate(11 * MIB)
        assert allocator.counters.allocated == allocated


@pytest.mark.parametrize("seed", range(12))
def test_as_the_plain_one(seed):
    trace = random_trace(seed)
    found = simulate(trace)
    assert (found.allocated_peak, found.reserved_peak) == plain_peaks(trace)


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_blocks_in_use_never_overlap_and_the_capacity_holds(seed, expandable):
    rng = random.Random(seed)
    allocator, live = CachingAllocator(expandable=expandable, capacity=700 * MIB), []
    for _ in range(600):
        if live and rng.random() < 0.48:
            allocator.free(live.pop(rng.randrange(len(live))))
            continue
        size = rng.choice([rng.randint(1, MIB), rng.randint(MIB, 60 * MIB)])
        try:
            live.append(allocator.allocate(size, rng.randrange(2)))
        except OutOfDeviceMemoryError:
            # Then it is full: not even without what is free in segments that are used.
            assert allocator.counters.reserved + size > 700 * MIB
        ranges = sorted((block.start, block.start + block.size) for block in live)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
        assert sum(block.size for block in live) == allocator.counters.allocated <= allocator.counters.reserved
        assert allocator.counters.reserved <= 700 * MIB


def holds(*sizes):
    builder = TraceBuilder()
    for size in sizes:
        builder.allocate(size)
    return builder


def test_what_the_program_gave_back_is_given_back():
    builder = TraceBuilder()
    builder.free(builder.allocate(30 * MIB))
    builder.release()
    builder.allocate(40 * MIB)
    found = simulate(builder.build())
    assert (found.reserved_peak, found.device_frees, found.retries) == (40 * MIB, 1, 0)


def test_where_memory_ends_the_request_is_named():
    trace = holds(30 * MIB, 0, 30 * MIB).build()
    assert simulate(trace, capacity=50 * MIB).failed == 2
    assert simulate(trace, capacity=60 * MIB).failed is None
    assert simulate(trace, capacity=60 * MIB, arena_bytes=61 * MIB).failed == ARENA


def test_a_trace_is_replayed_with_collection():
    builder = TraceBuilder()
    builder.free(builder.allocate(30 * MIB))
    builder.allocate(40 * MIB)
    trace = builder.build()
    assert simulate(trace, capacity=100 * MIB).reserved_peak == 70 * MIB
    assert simulate(trace, capacity=100 * MIB, collection=0.2).reserved_peak == 40 * MIB


def test_what_is_placed_lives_in_the_arena():
    trace = holds(30 * MIB, 12 * MIB, 30 * MIB).build()
    found = simulate(trace, arena_bytes=44 * MIB, placed={0, 2})
    assert found.reserved_peak == 56 * MIB
    assert found.device_allocations == 2


def test_addresses_that_are_known_decide_between_blocks_of_one_size():
    def second_taken(segments):
        allocator = CachingAllocator(segments=segments)
        first, second = allocator.allocate(16 * MIB), allocator.allocate(16 * MIB)
        allocator.free(first)
        allocator.free(second)
        return allocator.allocate(16 * MIB) is second

    assert not second_taken(())  # both in one chunk, in which addresses rise
    assert second_taken([(64 * MIB, 16 * MIB), (0, 16 * MIB)])
    assert not second_taken([(0, 16 * MIB), (64 * MIB, 16 * MIB)])


def test_addresses_are_made_up_where_another_size_is_asked_for():
    allocator = CachingAllocator(segments=[(64 * MIB, 16 * MIB), (0, 18 * MIB)])
    blocks = [allocator.allocate(16 * MIB) for _ in range(3)]
    starts = [block.start for block in blocks]
    assert starts[0] == 64 * MIB
    assert all(start >= 80 * MIB for start in starts[1:])
    assert starts[2] >= starts[1] + 16 * MIB
