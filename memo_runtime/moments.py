"""What a block by tiles holds at one moment, for any length, tile and share of kept products.

    backward of a segment   tile 0         | tile 1 ...          | first tile with nothing kept ...
    its products            all that are   | without those of    | none
                            kept           | tiles that are over |
    full-length gradients   made when its program is over | there
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from memo_runtime.sizes import TILES_AHEAD, Growth


class TileAt(StrEnum):
    """Which tile of a segment is at hand."""

    ANY = "any"  # none, or whichever
    FIRST_KEPT = "first kept"  # the first, and its products are kept
    FIRST_BARE = "first bare"  # the first, and nothing is kept
    LATER_KEPT = "later kept"  # in backward the second, in forward the last whose products are kept
    LATER_BARE = "later bare"  # one behind the first with nothing kept


class Stretch(StrEnum):
    """Which stretch of a backward: before its attention, with it, or behind it. A block with none is all behind it."""

    EARLY = "early"
    MIDDLE = "middle"
    LATE = "late"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Device bytes of a block by tiles at one moment beside its stash.

    Attributes:
        full: by tokens. tile: of one tile. fixed: of weights and sums of their gradients.
        missing: of the stash, what is not made yet, by tokens.
        kept: of products that are there whichever tile is at hand, by kept tokens.
        own: likewise of the segment at hand, whose products come or go tile by tile.
        at: the tile at hand. stretch: of the backward; in forward it says nothing.
    """

    full: Growth
    tile: Growth = field(default_factory=Growth)
    fixed: int = 0
    missing: Growth = field(default_factory=Growth)
    kept: Growth = field(default_factory=Growth)
    own: Growth = field(default_factory=Growth)
    at: TileAt = TileAt.ANY
    stretch: Stretch = Stretch.MIDDLE

    def bytes_at(self, tokens: int, tile: int, prefix: int, *, backward: bool, sent: int = 0) -> int | None:
        """Bytes beside a complete stash and no products at all (less than 0: not all of the stash is there).

        None: with ``prefix`` kept tokens of ``tokens``, in tiles of ``tile``, there is no such moment. The products of
        the last ``sent`` of these are in host memory; what has landed of them is counted.
        """
        stays = prefix - sent
        if self.at is TileAt.ANY:
            own = 0
        elif self.at is TileAt.FIRST_KEPT:
            if not prefix:
                return None
            own = _landed(stays, prefix, tile, 0) if backward else 0
        elif self.at is TileAt.LATER_KEPT:
            if prefix <= tile:
                return None
            own = _landed(stays, prefix, tile, 1) - tile if backward else min(stays, prefix - tile)
        else:
            later = self.at is TileAt.LATER_BARE
            if (later and (prefix >= tokens or tokens <= tile)) or (not later and prefix):
                return None
            own = 0 if backward else stays
        products = self.kept.at(stays) + self.own.at(own)
        return self.full.at(tokens) - self.missing.at(tokens) + self.tile.at(tile) + self.fixed + products


def _landed(stays: int, prefix: int, tile: int, number: int) -> int:
    """Rows up to which products are there while tile ``number`` goes backward; the first ``stays`` never left."""
    return min(prefix, max(stays, (number + 1 + TILES_AHEAD) * tile))
