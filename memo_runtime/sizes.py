"""Sizes by tokens, and what decides how bytes go to the host."""

from __future__ import annotations

from dataclasses import dataclass

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
