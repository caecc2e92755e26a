"""Products of tiles on their way to the host and back: bits, bytes, and how many at a time."""

from __future__ import annotations

import gc

import pytest
import torch

from memo_runtime.errors import HostLimitError
from memo_runtime.execution.stash import Tools
from memo_runtime.execution.tiled_products import Departures, Products
from memo_runtime.execution.tiled_swap import TiledSwap
from memo_runtime.sizes import TILES_AHEAD, TILES_OUTSTANDING, slot_bytes

CPU = torch.device("cpu")
TILE = 3


@pytest.fixture
def swap():
    tools = Tools(CPU, 1 << 20)
    return TiledSwap(CPU, tools.pool, tools.engine)


def products_of(number):
    """Of several widths, the narrow ones first, in several orders of dimensions."""
    generator = torch.Generator().manual_seed(number)
    wide = torch.randn(5, TILE, generator=generator, dtype=torch.float64).t()
    return [wide > 0, wide.bfloat16(), torch.randn(1, TILE, 7, generator=generator), wide]


def size_of(tensors):
    return sum(one.numel() * one.element_size() for one in tensors)


def test_bits_come_back_in_order_and_bytes_are_exact(swap):
    sent, size = Products(swap, stages=3, tile=TILE), size_of(products_of(0))
    for number in range(6):
        sent.store(2, number * TILE, products_of(number))
    assert swap.pool.in_use == 6 * slot_bytes(size)
    assert swap.counters.bytes_to_host == 6 * size
    for number in range(6):
        sent.fetch_from(2, number * TILE)
        assert swap.counters.bytes_to_device == min(6, number + 1 + TILES_AHEAD) * size
        assert swap.ledger.current == min(6 - number, 1 + TILES_AHEAD) * size
        for found, want in zip(sent.take(2, number * TILE), products_of(number), strict=True):
            assert torch.equal(found, want)
            assert found.stride() == want.stride()
        sent.over(2, number * TILE, retain=False)
    assert (swap.ledger.current, swap.pool.in_use, swap.transfer.open_copies) == (0, 0, 0)


def test_a_backward_that_is_not_the_last_leaves_them(swap):
    sent = Products(swap, stages=1, tile=TILE)
    sent.store(0, 0, products_of(0))
    for retain in (True, True, False):
        assert swap.pool.in_use > 0
        sent.fetch_first()
        sent.fetch_from(0, 0)
        assert torch.equal(sent.take(0, 0)[3], products_of(0)[3])
        sent.over(0, 0, retain=retain)
        sent.done(retain=retain)
        assert swap.ledger.current == 0
    assert swap.pool.in_use == 0
    assert sent.take(0, 0) == []


def test_what_was_dropped_is_held_by_nobody(swap):
    sent = Products(swap, stages=1, tile=TILE)
    sent.store(0, 0, products_of(0))
    sent.fetch_first()
    assert swap.ledger.current > 0
    del sent
    gc.collect()
    assert (swap.ledger.current, swap.pool.in_use, swap.transfer.open_copies) == (0, 0, 0)


def test_the_host_budget_holds():
    tools = Tools(CPU, slot_bytes(size_of(products_of(0))))
    sent = Products(TiledSwap(CPU, tools.pool, tools.engine), stages=1, tile=TILE)
    sent.store(0, 0, products_of(0))
    with pytest.raises(HostLimitError):
        sent.store(0, TILE, products_of(1))


def test_the_oldest_is_waited_for_beyond_what_may_be_under_way():
    class Counted:
        released = 0

        def sent(self):
            Counted.released += 1

    departures, tiles = Departures(), [Counted() for _ in range(TILES_OUTSTANDING + 3)]
    for number, tile in enumerate(tiles):
        departures.add(tile)
        assert Counted.released == max(0, number + 1 - TILES_OUTSTANDING)


@pytest.mark.parametrize("step", ["sent", "take"])
def test_a_wait_that_is_interrupted_is_made_again(swap, step, monkeypatch):
    """Before it begins: whoever comes next must not take for there what is still under way."""
    products = Products(swap, stages=1, tile=TILE)
    products.store(0, 0, products_of(0))
    products.fetch_from(0, 0)
    (tile,) = products._tiles.values()
    if step == "sent":
        tile._out = tile._back
    call = getattr(products, step)
    arguments = (0, 0) if step == "take" else ()
    with monkeypatch.context() as patch:
        patch.setattr(type(swap.transfer), "_wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            call(*arguments)
    waited = []
    wait = swap.transfer._wait
    monkeypatch.setattr(swap.transfer, "_wait", lambda number: (waited.append(number), wait(number)))
    call(*arguments)
    assert len(waited) == 1
    for found, want in zip(products.take(0, 0), products_of(0), strict=True):
        assert torch.equal(found, want)


def interrupt(*_):
    raise KeyboardInterrupt
