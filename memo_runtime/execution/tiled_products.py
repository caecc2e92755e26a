"""Matrix products of tiles in host memory.

    compute    | forward of tile 0 | of tile 1 | ...        | backward of tile 0 | of tile 1 | ...
    to host    |                   | those of 0| of 1 ...   |                    |           |
    to device  |                   |           |            | those of 1         | of 2      | of 3 ...

A tile's products go to the host as soon as they are made. At most ``TILES_OUTSTANDING`` tiles of all blocks are under
way at a time, since their sources are alive so long: compute waits for the oldest before it goes on beyond that. In
backward those of the tile at hand and of the ``TILES_AHEAD`` next ones of its segment are on the device. The first ones
of a block land while the first segment of the block above goes backward, when nothing of the attention there is alive
any more.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from memo_runtime.execution.ledger import Share
from memo_runtime.execution.tiled_rows import is_dense
from memo_runtime.native.engine import Ticket
from memo_runtime.native.pool import Slot
from memo_runtime.sizes import TILES_AHEAD, TILES_OUTSTANDING

if TYPE_CHECKING:
    from memo_runtime.execution.tiled_swap import TiledSwap


class _Tile:
    """The products of one tile. What is on the device for it is in its share, and goes with it."""

    def __init__(self, products: Sequence[torch.Tensor], slot: Slot, share: Share) -> None:
        self._layouts = [(one.shape, one.stride(), one.dtype) for one in products]
        self._slot = slot
        self._share = share
        self._out: Ticket | None = None
        self._back: Ticket | None = None
        self._landed: list[torch.Tensor] | None = None
        self.size_bytes = sum(one.numel() * one.element_size() for one in products)

    def send(self, swap: TiledSwap, products: Sequence[torch.Tensor]) -> None:
        """Start the copy to the host."""
        flat = (one.as_strided((one.numel(),), (1,)).view(1, -1, 1) for one in products)
        if swap.device.type != "cpu":
            self._share.hold(self.size_bytes)
        self._out = swap.transfer.many_to_host(zip(flat, self._pieces(), strict=True))
        swap.counters.bytes_to_host += self.size_bytes
        if swap.device.type == "cpu":
            self._finish()  # nothing is under way: the caller's cores make the copies

    def sent(self) -> None:
        """Make compute wait for the copy to the host, and let go of its sources."""
        if self._finish():
            self._share.hold(-self.size_bytes)

    def _finish(self) -> bool:
        if self._out is None:
            return False
        # In this order: where an interrupt cuts it off, it is waited for again.
        self._out.release()
        self._out = None
        return True

    def fetch(self, swap: TiledSwap) -> None:
        """Start the copy back, once."""
        self.sent()
        if self._landed is None:
            made = [torch.empty_strided(shape, stride, dtype=dtype, device=swap.device)
                    for shape, stride, dtype in self._layouts]  # fmt: skip
            flat = (one.as_strided((one.numel(),), (1,)).view(1, -1, 1) for one in made)
            self._back = swap.transfer.many_to_device(zip(self._pieces(), flat, strict=True))
            self._landed = made
            self._share.hold(self.size_bytes)
            swap.counters.bytes_to_device += self.size_bytes

    def take(self) -> list[torch.Tensor]:
        """What has landed, from now on the caller's alone."""
        assert self._landed is not None, "it was fetched"
        if self._back is not None:
            # In this order, as above.
            self._back.release()
            self._back = None
        return self._landed

    def drop(self) -> None:
        """What has landed goes."""
        if self._landed is not None:
            self._landed = self._back = None
            self._share.hold(-self.size_bytes)

    def _pieces(self) -> list[torch.Tensor]:
        """The slot in parts by product, wide elements first, so that none needs padding."""
        parts: dict[int, torch.Tensor] = {}
        start = 0
        for index in sorted(range(len(self._layouts)), key=lambda at: -self._layouts[at][2].itemsize):
            shape, _, dtype = self._layouts[index]
            stop = start + shape.numel() * dtype.itemsize
            parts[index] = self._slot.memory[start:stop].view(dtype).view(1, -1, 1)
            start = stop
        return [parts[index] for index in range(len(self._layouts))]


class Departures:
    """Products under way to the host, of all blocks of a step, the oldest first."""

    def __init__(self) -> None:
        self._tiles: deque[weakref.ref[_Tile]] = deque()

    def add(self, tile: _Tile) -> None:
        """One more; the oldest beyond what may be under way are waited for."""
        self._tiles.append(weakref.ref(tile))
        while len(self._tiles) > TILES_OUTSTANDING:
            oldest = self._tiles.popleft()()
            if oldest is not None:
                oldest.sent()


class Products:
    """What one call of a block has sent, by stage and start of the tile; ``stages``: their number."""

    def __init__(self, swap: TiledSwap, *, stages: int, tile: int) -> None:
        self._swap = swap
        self._last_stage = stages - 1
        self._tile = tile
        self._tiles: dict[tuple[int, int], _Tile] = {}

    def store(self, stage: int, start: int, products: Sequence[torch.Tensor]) -> None:
        """Send the products of a tile; they may be dropped at once.

        Raises:
            HostLimitError: the host budget has no room.
        """
        products = [one if is_dense(one) else one.contiguous() for one in products]
        size = sum(one.numel() * one.element_size() for one in products)
        tile = _Tile(products, self._swap.pool.take(size), Share(self._swap.ledger))
        self._tiles[stage, start] = tile
        tile.send(self._swap, products)
        self._swap.order.departures.add(tile)

    def sent(self) -> None:
        """Compute waits for all copies to the host, and their sources go."""
        for tile in self._tiles.values():
            tile.sent()

    def fetch_from(self, stage: int, start: int) -> None:
        """The tile at ``start`` is about to go backward: start the copies back of its products and of the next ones."""
        self._fetch(stage, start, 1 + TILES_AHEAD)

    def fetch_first(self) -> None:
        """The block above is nearly over: fetch what this one starts with, if that is a stage with products."""
        self._fetch(self._last_stage, 0, TILES_AHEAD)

    def _fetch(self, stage: int, start: int, count: int) -> None:
        for at in range(start, start + count * self._tile, self._tile):
            if (tile := self._tiles.get((stage, at))) is not None:
                tile.fetch(self._swap)

    def take(self, stage: int, start: int) -> list[torch.Tensor]:
        """The products of a tile that was fetched; none if they were not sent."""
        tile = self._tiles.get((stage, start))
        return tile.take() if tile is not None else []

    def over(self, stage: int, start: int, *, retain: bool) -> None:
        """The tile has gone backward; ``retain``: it will once more."""
        if (tile := self._tiles.get((stage, start))) is not None:
            tile.drop()
            if not retain:
                del self._tiles[stage, start]

    def done(self, *, retain: bool) -> None:
        """The block has gone backward, or never will."""
        for tile in self._tiles.values():
            tile.drop()
        if not retain:
            self._tiles.clear()
