"""What a block by tiles holds at one moment, for any length, tile and share of kept products.

    backward of a segment   tile 0         | tile 1 ...          | first tile with nothing kept ...
    its products            all that are   | without those of    | none
                            kept           | tiles that are over |
    full-length gradients   made when its program is over | there
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from math import gcd

from memo_runtime.sizes import TILES_AHEAD, Growth

#: Elements of a tensor whose places do not fit in 32 bits with a sign.
MOST_ELEMENTS = 2**31


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
        full: by tokens. tile: of one tile. fixed: of weights and sums of their gradients. narrow: less of these where
            one tile holds all tokens, so that there is nothing to sum. alone: likewise less of ``tile``, by tokens:
            rows that are copied where those of a tile lie apart.
        part: of all heads of an attention, by tokens, of which one group at a time is there.
        missing: of the stash, what is not made yet, by tokens.
        kept: of products that are there whichever tile is at hand, by kept tokens.
        own: likewise of the segment at hand, whose products come or go tile by tile.
        at: the tile at hand. stretch: of the backward; in forward it says nothing.
    """

    full: Growth
    tile: Growth = field(default_factory=Growth)
    part: Growth = field(default_factory=Growth)
    fixed: int = 0
    narrow: int = 0
    alone: Growth = field(default_factory=Growth)
    missing: Growth = field(default_factory=Growth)
    kept: Growth = field(default_factory=Growth)
    own: Growth = field(default_factory=Growth)
    at: TileAt = TileAt.ANY
    stretch: Stretch = Stretch.MIDDLE

    def bytes_at(
        self, tokens: int, tile: int, prefix: int, *, backward: bool, sent: int = 0, groups: int = 1
    ) -> int | None:
        """Bytes beside a complete stash and no products at all (less than 0: not all of the stash is there).

        None: with ``prefix`` kept tokens of ``tokens``, in tiles of ``tile``, there is no such moment. The products of
        the last ``sent`` of these are in host memory; what has landed of them is counted. ``groups``: of heads.
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
        full = self.full.at(tokens) - self.missing.at(tokens) + self.part.at(tokens) // groups
        less = self.narrow + self.alone.at(tokens) if tokens <= tile else 0
        return full + self.tile.at(tile) + self.fixed + products - less


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledProfile:
    """What a block takes when it runs by tiles.

    Attributes:
        stash: bytes of each tensor that backward needs whole and that can go to the host (inputs, results of attention,
            log-sum-exps). resident: of those that stay (masks made inside). products: of each
            stage's matrix products, by tokens.
        forward, backward: moments that may be the worst.
        again_flops: run again; saved_flops: less of it by kept tokens. attention: kernel of each attention, and
            queries that its forward takes at a time, 0 for all.
        heads: the number of groups of heads divides it. forward_by_groups, backward_by_groups: moments where attention
            runs so. group_flops: run again for each group but the first. elements: of the largest tensor that such an
            attention is given or yields.
        mixer_inputs: bytes of what its mixers are given (queries, keys, values), by tokens, where it can stay on the
            device. mixer_input_flops: of again_flops, what that saves. forward_with_inputs, backward_with_inputs:
            moments where it stays, and is part of the stash.
        result: moments of making the block's result again from its stash, by its last segment; none: it cannot be.
            result_flops: what that takes. chained: its input was the result of the block before, as it is.
        forward_seconds, backward_seconds: of the block by tiles, the latter without what is run again, which takes
            seconds_per_flop less saved_seconds by kept tokens; 0: not timed, and estimated from those of the block
            as it is. product_seconds: of the forward of the segments that have products.
    """

    stash: tuple[Growth, ...]
    resident: Growth
    products: tuple[Growth, ...]
    forward: tuple[Moment, ...]
    backward: tuple[Moment, ...]
    again_flops: Growth
    saved_flops: Growth
    attention: tuple[str, ...] = ()
    queries: tuple[int, ...] = ()
    heads: int = 1
    forward_by_groups: tuple[Moment, ...] = ()
    backward_by_groups: tuple[Moment, ...] = ()
    group_flops: Growth = field(default_factory=Growth)
    elements: Growth = field(default_factory=Growth)
    mixer_inputs: Growth = field(default_factory=Growth)
    mixer_input_flops: Growth = field(default_factory=Growth)
    forward_with_inputs: tuple[Moment, ...] = ()
    backward_with_inputs: tuple[Moment, ...] = ()
    result: tuple[Moment, ...] = ()
    result_flops: Growth = field(default_factory=Growth)
    chained: bool = False
    forward_seconds: Growth = field(default_factory=Growth)
    backward_seconds: Growth = field(default_factory=Growth)
    seconds_per_flop: float = 0.0
    saved_seconds: Growth = field(default_factory=Growth)
    product_seconds: Growth = field(default_factory=Growth)

    def product_bytes(self, rows: int) -> int:
        """Bytes of the products of ``rows`` tokens."""
        return sum(size.at(rows) for size in self.products)

    def groups_at(self, tokens: int, asked: int) -> int:
        """Groups of heads for ``tokens`` tokens: what divides the heads of ``asked``, or more.

        Kernels may count elements in 32 bits, so each group has fewer than 2^31 if that can be.
        """
        least = gcd(asked, self.heads)
        enough = [count for count in range(least, self.heads + 1)
                  if self.heads % count == 0 and self.elements.at(tokens) < count * MOST_ELEMENTS]  # fmt: skip
        return min(enough, default=self.heads)

    def attention_texts(self, groups: int) -> tuple[str, ...]:
        """How each attention runs in ``groups`` of heads, which divide ``heads``."""
        queries = self.queries or (0,) * len(self.attention)
        each = zip(self.attention, queries, strict=True)
        return tuple(attention_text(kernel, groups, count) for kernel, count in each)


def attention_text(kernel: str, groups: int, queries: int) -> str:
    """How an attention runs: ``cudnn, 4 groups, queries by 32,768``; all heads and all queries at once go unsaid."""
    parts = [f"{groups} groups" if groups > 1 else "", f"queries by {queries:,}" if queries else ""]
    return ", ".join([kernel, *filter(None, parts)])


def _landed(stays: int, prefix: int, tile: int, number: int) -> int:
    """Rows up to which products are there while tile ``number`` goes backward; the first ``stays`` never left."""
    return min(prefix, max(stays, (number + 1 + TILES_AHEAD) * tile))
