"""What a block by tiles holds at one moment, for any length, tile and share of kept products.

    backward of a segment   tile 0         | tile 1 ...          | first tile with nothing kept ...
    its products            all that are   | without those of    | none
                            kept           | tiles that are over |
    full-length gradients   made when its program is over | there
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from memo_runtime.sizes import Growth


class TileAt(StrEnum):
    """Which tile of a segment is at hand."""

    ANY = "any"  # none, or whichever
    FIRST_KEPT = "first kept"  # the first, and its products are kept
    FIRST_BARE = "first bare"  # the first, and nothing is kept
    LATER_KEPT = "later kept"  # in backward the second, in forward the last whose products are kept
    LATER_BARE = "later bare"  # one behind the first with nothing kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Device bytes of a block by tiles at one moment beside its stash.

    Attributes:
        full: by tokens. tile: of one tile. fixed: of weights and sums of their gradients.
        missing: of the stash, what is not made yet, by tokens.
        kept: of products that are there whichever tile is at hand, by kept tokens.
        own: likewise of the segment at hand, whose products come or go tile by tile.
        at: the tile at hand.
    """

    full: Growth
    tile: Growth = field(default_factory=Growth)
    fixed: int = 0
    missing: Growth = field(default_factory=Growth)
    kept: Growth = field(default_factory=Growth)
    own: Growth = field(default_factory=Growth)
    at: TileAt = TileAt.ANY

    def bytes_at(self, tokens: int, tile: int, prefix: int, *, backward: bool) -> int | None:
        """Bytes beside a complete stash and no products at all (less than 0: not all of the stash is there).

        None: with ``prefix`` kept tokens of ``tokens``, in tiles of ``tile``, there is no such moment.
        """
        if self.at is TileAt.ANY:
            own = 0
        elif self.at is TileAt.FIRST_KEPT:
            if not prefix:
                return None
            own = prefix if backward else 0
        elif self.at is TileAt.LATER_KEPT:
            if prefix <= tile:
                return None
            own = prefix - tile
        else:
            later = self.at is TileAt.LATER_BARE
            if (later and (prefix >= tokens or tokens <= tile)) or (not later and prefix):
                return None
            own = 0 if backward else prefix
        products = self.kept.at(prefix) + self.own.at(own)
        return self.full.at(tokens) - self.missing.at(tokens) + self.tile.at(tile) + self.fixed + products
