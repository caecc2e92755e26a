"""Sizes by tokens, and what decides how bytes go to the host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

#: Every host slot starts at a multiple of this many bytes (a cache line; what copy engines like).
HOST_ALIGNMENT = 64

#: What is smaller is not copied on its own: a copy costs more than the bytes are worth.
MIN_SWAP_BYTES = 1024


#: Tiles whose products are under way to the host at a time, and which are fetched before the one at hand is over.
TILES_OUTSTANDING, TILES_AHEAD = 8, 2

#: Tokens of a tile of the norm behind the blocks.
NORM_TILE = 2048

#: Rows of a dropped tensor that are compared when it is rebuilt.
WITNESS_ROWS = 8


def slot_bytes(size_bytes: int) -> int:
    """Host memory that ``size_bytes`` occupy."""
    return -(-size_bytes // HOST_ALIGNMENT) * HOST_ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """``constant + linear * t + quadratic * t**2`` with t the tokens, rounded up to ``multiple``."""

    constant: float = 0
    linear: float = 0
    quadratic: float = 0
    multiple: int = 1

    def at(self, tokens: int) -> int:
        """Value at ``tokens``, as a whole number (bytes, FLOPs)."""
        return round(self.exact(tokens))

    def exact(self, tokens: int) -> float:
        """Value at ``tokens`` without rounding (seconds)."""
        t = -(-tokens // self.multiple) * self.multiple
        return self.constant + self.linear * t + self.quadratic * t * t


@dataclass(frozen=True, slots=True, kw_only=True)
class LongEnd:
    """What head and loss need where the hidden state is long, so that the norm behind the blocks runs by tiles.

    ``tokens``: from this length on.
    """

    tokens: int
    outside_peak: Growth
    loss_peak: Growth


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """A storage of which there is more, or something else, than one tensor's bytes; ``number`` tells it from others."""

    number: int
    size: Growth


class Part(Protocol):
    """Bytes that are a storage, or lie in one."""

    @property
    def size(self) -> Growth:
        """Its own."""
        ...

    @property
    def storage(self) -> Storage | None:
        """What it lies in; None: it is all of a storage."""
        ...


def stored_bytes(parts: Iterable[Part], tokens: int) -> int:
    """Bytes of the storages that hold ``parts``, each once: where a tensor is left as it is, all of its stays."""
    own, larger = 0, {}
    for part in parts:
        if part.storage is None:
            own += part.size.at(tokens)
        else:
            larger[part.storage.number] = part.storage.size.at(tokens)
    return own + sum(larger.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Bytes of many storages that are sorted as they come, small ones packed together; see ``blocks.parcels``.

    Attributes:
        live: storages that hold something saved while the forward runs, also for nodes that it drops again.
        copied: to the host and back, if they go there. slots: host memory for that. gathered: copies that are made on
            the device to be sent.
    """

    live: Growth
    copied: Growth
    slots: Growth
    gathered: Growth
