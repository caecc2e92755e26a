"""Blocks of the caching allocator and the pools of free ones.

A segment is memory from the device; it is cut into blocks, which know their neighbours. Free neighbours are
joined at once, so that two free blocks never stand side by side.

    segment   | a (in use) | free      | b (in use) | free |         expandable:  ... | free | not mapped ... |
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Block:
    """``size`` bytes at ``start``; ``mapped`` is False for the part of an expandable segment without memory.

    ``free_since``: how often its pool had been searched when it became free.
    """

    start: int
    size: int
    stream: int
    pool: Pool
    expandable: bool = False
    mapped: bool = True
    used: bool = False
    free_since: int = 0
    before: Block | None = None
    after: Block | None = None

    @property
    def age(self) -> int:
        """How often its pool was searched since it is free."""
        return self.pool.searches - self.free_since

    @property
    def whole(self) -> bool:
        """Whether it is all of its segment."""
        return self.before is None and self.after is None

    def cut(self, size: int) -> Block:
        """Keep the first ``size`` bytes; the rest becomes a block behind this one."""
        rest = Block(self.start + size, self.size - size, self.stream, self.pool, self.expandable, self.mapped)
        rest.before, rest.after = self, self.after
        if self.after is not None:
            self.after.before = rest
        self.after, self.size = rest, size
        return rest

    def join(self, other: Block | None) -> None:
        """Take in the neighbour ``other``, if it is free and mapped as this one is."""
        if other is None or other.used or other.mapped != self.mapped:
            return
        other.pool.of(other).discard(other)
        if other is self.before:
            self.start, self.before = other.start, other.before
            if self.before is not None:
                self.before.after = self
        else:
            self.after = other.after
            if self.after is not None:
                self.after.before = self
        self.size += other.size


@dataclass(eq=False, slots=True)
class FreeBlocks:
    """Free blocks in the order in which they are looked at; ``by_size``: smallest first, then lowest address."""

    by_size: bool
    _keys: list[tuple[int, int, int]] = field(default_factory=list)
    _blocks: dict[tuple[int, int, int], Block] = field(default_factory=dict)

    def _key(self, block: Block) -> tuple[int, int, int]:
        return block.stream, block.size if self.by_size else 0, block.start

    def add(self, block: Block) -> None:
        """One more."""
        key = self._key(block)
        insort(self._keys, key)
        self._blocks[key] = block
        block.free_since = block.pool.searches

    def discard(self, block: Block) -> None:
        """One less; none that is not there."""
        key = self._key(block)
        if self._blocks.pop(key, None) is not None:
            del self._keys[bisect_left(self._keys, key)]

    def from_size(self, stream: int, size: int) -> list[Block]:
        """Blocks of ``stream`` with at least ``size`` bytes, in order."""
        first = bisect_left(self._keys, (stream, size, 0))
        last = bisect_left(self._keys, (stream + 1, 0, 0))
        return [self._blocks[key] for key in self._keys[first:last]]

    def best(self, stream: int, size: int) -> Block | None:
        """The first of ``from_size``."""
        at = bisect_left(self._keys, (stream, size, 0))
        if at == len(self._keys) or self._keys[at][0] != stream:
            return None
        return self._blocks[self._keys[at]]

    def all(self) -> list[Block]:
        """Every block."""
        return [self._blocks[key] for key in self._keys]


@dataclass(eq=False, slots=True)
class Pool:
    """Small requests and large ones have a pool each; blocks never change theirs.

    ``free`` are mapped, ``unmapped`` are the rests of expandable segments; ``searches`` counts requests.
    """

    small: bool
    searches: int = 0
    free: FreeBlocks = field(default_factory=lambda: FreeBlocks(by_size=True))
    unmapped: FreeBlocks = field(default_factory=lambda: FreeBlocks(by_size=False))

    def of(self, block: Block) -> FreeBlocks:
        """Where ``block`` belongs when it is free."""
        return self.free if block.mapped else self.unmapped
