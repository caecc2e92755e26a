"""A dictionary that remembers the most recently used entries only: what a long run meets must not pile up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """At most ``limit`` entries; the one that was not used for longest goes first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: OrderedDict[Hashable, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Value | None:
        """The value of ``key``, which counts as used now; None if it is not there."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: Hashable, value: Value) -> None:
        """Remember ``value``."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        while len(self._entries) > self.limit:
            self._entries.popitem(last=False)

    def latest(self) -> Value | None:
        """The value that was used last; None if there is none."""
        return next(reversed(self._entries.values()), None)

    def values(self) -> Iterator[Value]:
        """The values, the least recently used first."""
        yield from self._entries.values()
