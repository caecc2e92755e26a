"""PyTorch's CUDA caching allocator, as far as it decides about memory.

The rules are those of c10/cuda/CUDACachingAllocator.cpp with its default settings (no max_split_size, no
power-of-two rounding), with and without ``expandable_segments`` and ``garbage_collection_threshold``:

    request          rounded up to 512 bytes; up to 1 MiB it is small, above it is large
    free blocks      of its stream and pool: the smallest that is large enough, at the lowest address
    none fits        a new segment: 2 MiB for small ones, 20 MiB below 10 MiB, above that a multiple of 2 MiB
    splitting        the rest of a block stays free if it is at least 512 bytes (small, expandable), else above 1 MiB;
                     a smaller rest belongs to the request
    device is full   segments without any block in use go back to the device, then it is asked once more (a retry)
    collection       above its threshold, before the device is asked: whole free large segments go back to it, first
                     those that were free for at least the average number of requests, until it is below
    expandable       one segment per stream and pool grows at its end, in pieces of 2 MiB (small) or 20 MiB (large)

Addresses of the device are those of ``segments``, where they are known, else made up (device_memory.py). They decide
only between blocks of one size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memo_runtime.simulation.blocks import Block, Pool
from memo_runtime.simulation.device_memory import DeviceMemory
from memo_runtime.units import MiB

_ROUND = 512
_SMALL_REQUEST = MiB
_SMALL_SEGMENT = 2 * MiB
_LARGE_SEGMENT = 20 * MiB
_OWN_SEGMENT = 10 * MiB
_ROUND_SEGMENT = 2 * MiB
#: Address space of one expandable segment: more than any device has, in whole pieces of either size.
_ADDRESS_SPACE = 5 << 42


class OutOfDeviceMemoryError(Exception):
    """The device has no room for the segment that is needed."""


@dataclass(slots=True)
class Counters:
    """Bytes now and at most, and how often the device was asked: ``retries`` after giving the cache back."""

    allocated: int = 0
    allocated_peak: int = 0
    reserved: int = 0
    reserved_peak: int = 0
    device_allocations: int = 0
    device_frees: int = 0
    retries: int = 0

    def allocate(self, size: int) -> None:
        """A block of ``size`` is in use."""
        self.allocated += size
        self.allocated_peak = max(self.allocated_peak, self.allocated)

    def reserve(self, size: int) -> None:
        """The device gave ``size``."""
        self.reserved += size
        self.reserved_peak = max(self.reserved_peak, self.reserved)
        self.device_allocations += 1

    def give_back(self, size: int) -> None:
        """The device has ``size`` again."""
        self.reserved -= size
        self.device_frees += 1


def round_request(size: int) -> int:
    """Bytes that a block for ``size`` has at least."""
    return max(_ROUND, -(-size // _ROUND) * _ROUND)


def segment_size(size: int) -> int:
    """Bytes of the segment that a rounded request asks the device for."""
    if size <= _SMALL_REQUEST:
        return _SMALL_SEGMENT
    if size < _OWN_SEGMENT:
        return _LARGE_SEGMENT
    return -(-size // _ROUND_SEGMENT) * _ROUND_SEGMENT


class CachingAllocator:
    """One device's allocator; ``capacity`` bounds what it reserves, None is unbounded.

    ``collection``: share of the capacity above which it collects, 0: never; PyTorch does so only where a fraction of
    the device was set. ``segments``: (address, bytes) that a device gave, in order (see ``DeviceMemory``).
    """

    def __init__(
        self,
        *,
        expandable: bool = False,
        capacity: int | None = None,
        collection: float = 0.0,
        segments: Iterable[tuple[int, int]] = (),
    ) -> None:
        self.counters = Counters()
        self._expandable = expandable
        self._capacity = capacity
        self._collected_above = None if capacity is None or not collection else int(collection * capacity)
        self._small, self._large = Pool(small=True), Pool(small=False)
        self._device = DeviceMemory(segments)

    def allocate(self, size: int, stream: int = 0) -> Block:
        """A block for ``size`` bytes on ``stream``.

        Raises:
            OutOfDeviceMemoryError: not even after all cached memory went back to the device.
        """
        size = round_request(size)
        pool = self._small if size <= _SMALL_REQUEST else self._large
        pool.searches += 1
        block = self._cached(pool, size, stream)
        if block is None:
            self._collect()
            block = self._fresh(pool, size, stream)
        if block is None:
            self.release_cached()
            self.counters.retries += 1
            block = self._fresh(pool, size, stream)
        if block is None:
            raise OutOfDeviceMemoryError
        rest = block.size - size
        if rest >= _ROUND if pool.small or self._expandable else rest > _SMALL_REQUEST:
            pool.free.add(block.cut(size))
        block.used = True
        self.counters.allocate(block.size)
        return block

    def free(self, block: Block) -> None:
        """``block`` is not used any more."""
        self.counters.allocated -= block.size
        block.used = False
        self._settle(block)

    def release_cached(self) -> None:
        """Give the device what no block in use needs (``torch.cuda.empty_cache``)."""
        for pool in (self._large, self._small):
            for block in pool.free.all():
                if block.expandable:
                    self._unmap(block)
                elif block.whole:
                    self._release(block)

    def _release(self, block: Block) -> None:
        """Give a free block that is a whole segment back."""
        block.pool.free.discard(block)
        self._device.free(block.start, block.size)
        self.counters.give_back(block.size)

    def _collect(self) -> None:
        """Give the oldest free segments back while more than the threshold is reserved."""
        if self._collected_above is None:
            return
        wanted = self.counters.reserved - self._collected_above
        left = [block for block in self._large.free.all() if block.whole and not block.expandable]
        while wanted > 0 and left:
            average = sum(block.age for block in left) / len(left)
            for block in [block for block in left if block.age >= average]:
                if wanted <= 0:
                    break
                wanted -= block.size
                left.remove(block)
                self._release(block)

    @property
    def num_segments(self) -> int:
        """Segments that are held; an expandable one counts once, whatever its size."""
        return self._device.num_ranges

    def _settle(self, block: Block) -> None:
        """Join ``block`` with free neighbours, and keep it among those of its kind."""
        block.join(block.before)
        block.join(block.after)
        block.pool.of(block).add(block)

    def _cached(self, pool: Pool, size: int, stream: int) -> Block | None:
        block = pool.free.best(stream, size)
        if block is None:
            return None
        if self._expandable:
            block = _least_expandable(pool.free.from_size(stream, size))
        pool.free.discard(block)
        return block

    def _fresh(self, pool: Pool, size: int, stream: int) -> Block | None:
        if self._expandable:
            return self._expanded(pool, size, stream)
        wanted = segment_size(size)
        if not self._has(wanted):
            return None
        self.counters.reserve(wanted)
        return Block(self._device.allocate(wanted), wanted, stream, pool)

    def _has(self, size: int) -> bool:
        return self._capacity is None or self.counters.reserved + size <= self._capacity

    def _expanded(self, pool: Pool, size: int, stream: int) -> Block | None:
        block = self._with_room(pool, size, stream)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            following = block.after
            assert following is not None and not following.mapped, "there was room behind it"
            # Mapping joins it with the free block before it, of which it becomes the end.
            if not self._map(following, min(size - block.size, following.size)):
                return None
            block = following
        pool.free.discard(block)
        return block

    def _with_room(self, pool: Pool, size: int, stream: int) -> Block:
        """A free or unmapped block that has ``size`` bytes with the free and unmapped ones behind it."""
        for block in pool.unmapped.from_size(stream, 0):
            found = block
            if block.before is not None and not block.before.used:
                found = block.before
            if _room(found, size) >= size:
                return found
        start = self._device.allocate(_ADDRESS_SPACE)
        segment = Block(start, _ADDRESS_SPACE, stream, pool, expandable=True, mapped=False)
        pool.unmapped.add(segment)
        return segment

    def _piece(self, pool: Pool) -> int:
        return _SMALL_SEGMENT if pool.small else _LARGE_SEGMENT

    def _map(self, block: Block, size: int) -> bool:
        """Give the first ``size`` bytes of ``block`` memory, in whole pieces; False: the device has none."""
        piece = self._piece(block.pool)
        size = min(block.size, -(-size // piece) * piece)
        if not self._has(size):
            return False
        block.pool.unmapped.discard(block)
        if size < block.size:
            block.pool.unmapped.add(block.cut(size))
        self.counters.reserve(size)
        block.mapped = True
        self._settle(block)
        return True

    def _unmap(self, block: Block) -> None:
        """Take the memory of whole pieces from a free block of an expandable segment."""
        piece = self._piece(block.pool)
        first = -(-block.start // piece) * piece
        last = (block.start + block.size) // piece * piece
        if last <= first:
            return
        block.pool.free.discard(block)
        middle = block
        if first > block.start:
            middle = block.cut(first - block.start)
            block.pool.free.add(block)
        if middle.start + middle.size > last:
            block.pool.free.add(middle.cut(last - middle.start))
        middle.mapped = False
        self.counters.give_back(middle.size)
        self._settle(middle)


def _room(block: Block | None, wanted: int) -> int:
    """Bytes of ``block`` and the blocks behind it up to the first in use; enough of them."""
    found = 0
    while block is not None and not block.used and found < wanted:
        found += block.size
        block = block.after
    return found


def _least_expandable(blocks: list[Block]) -> Block:
    """The first of ``blocks``, or a later one while that one could grow less.

    A block at the end of what is mapped counts with all that it can still become.
    """
    chosen = blocks[0]
    for other in blocks[1:]:
        if chosen.whole or _grown(other) >= _grown(chosen):
            break
        chosen = other
    return chosen


def _grown(block: Block) -> int:
    return block.size + (block.after.size if block.after is not None and not block.after.mapped else 0)
