"""The stash of tiled blocks in host memory: same gradients, exact bytes, nothing left behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from memo_runtime.errors import HostLimitError, StateChangedError
from memo_runtime.execution.stash import Tools
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_rows import is_dense
from memo_runtime.execution.tiled_swap import TiledSwap
from memo_runtime.native.backend import TorchBackend
from memo_runtime.native.engine import Ticket
from memo_runtime.native.pool import HostPool
from memo_runtime.native.twin import TorchEngine
from memo_runtime.sizes import slot_bytes
from tests.capture import blocks
from tests.exactness import hand_written
from tests.exactness.hand_written import HEADS, WIDTH

TOKENS = 29
CPU = torch.device("cpu")


def swap_of(limit=1 << 30):
    tools = Tools(CPU, limit)
    return TiledSwap(CPU, tools.pool, tools.engine)


def swap_on(engine):
    """A swap with ``engine`` for its copies."""
    return TiledSwap(CPU, HostPool(1 << 20, TorchBackend(CPU)), engine)


def stack(kind=hand_written.Attention, count=3):
    torch.manual_seed(0)
    return nn.ModuleList(kind() for _ in range(count)).double()


def tiles(layers, swap, *, keep_last=0, tile=8):
    last = len(layers) - keep_last
    return [TiledBlock(one, tile=tile, swap=swap, to_host=index < last) for index, one in enumerate(layers)]


def hidden():
    return torch.randn(2, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(layers, forwards):
    x = leaf = hidden().requires_grad_()
    for forward in forwards:
        x = forward(2 * x)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    return torch.autograd.grad(x, [leaf, *layers.parameters()], weights)


@pytest.mark.parametrize("kind", [
    hand_written.Attention,
    *(pytest.param(one, marks=pytest.mark.slow) for one in (hand_written.TwoMixers, blocks.LearnedBias)),
])  # fmt: skip
def test_gradients_are_those_without_swap_and_nothing_stays(kind):
    """First all of three blocks, then all but the last: they are captured once for both."""
    layers, swap = stack(kind), swap_of()

    def first(forward):
        return lambda x: forward(x)[0] if kind is blocks.LearnedBias else forward(x)

    expected = step(layers, [first(one) for one in tiles(layers, None)])
    forwards = tiles(layers, swap)
    for step_number in range(4):
        forwards[-1].to_host = step_number < 2
        found = step(layers, [first(one) for one in forwards])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert swap.pool.in_use == 0


def test_bytes_are_those_of_inputs_and_attention():
    layers, swap = stack(), swap_of()
    forwards = tiles(layers, swap, keep_last=1)
    step(layers, forwards)
    before = swap.counters.bytes_to_host
    step(layers, forwards)
    hidden_bytes, lse_bytes = 2 * TOKENS * WIDTH * 8, 2 * TOKENS * HEADS * 8
    moved = 2 * (2 * hidden_bytes + lse_bytes)  # two blocks: x, o and the log-sum-exp
    assert swap.counters.bytes_to_host - before == moved
    assert swap.counters.bytes_to_device == swap.counters.bytes_to_host


def test_inputs_are_freed_and_shared_arguments_stay():
    layers, swap = stack(hand_written.SharedValues, count=1), swap_of()
    (tiled,) = tiles(layers, swap)
    x = (2 * hidden().requires_grad_()).contiguous()
    alive = weakref.ref(x)
    y, _ = tiled(x, None)
    swap.order._release(keep=0)  # as the next blocks would: what was copied is let go
    del x
    gc.collect()
    assert alive() is None
    y.sum().backward()


def test_a_hidden_state_that_needs_no_gradient_is_freed_too():
    """As behind a frozen embedding, where adapters alone are trained: plans count it in host memory."""
    layers, swap = stack(count=2), swap_of()
    expected = torch.autograd.grad(layers[1](layers[0](2 * hidden())).sum(), [*layers.parameters()])
    forwards = tiles(layers, swap)
    for _ in range(2):
        x = 2 * hidden()
        alive, before = weakref.ref(x), swap.counters.bytes_to_host
        y = forwards[1](forwards[0](x))
        swap.order._release(keep=0)
        del x
        gc.collect()
        assert alive() is None
        found = torch.autograd.grad(y.sum(), [*layers.parameters()])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    hidden_bytes, lse_bytes = 2 * TOKENS * WIDTH * 8, 2 * TOKENS * HEADS * 8
    assert swap.counters.bytes_to_host - before == 2 * (2 * hidden_bytes + lse_bytes)
    assert swap.pool.in_use == 0


def test_a_hidden_state_stays_where_no_gradient_comes_back():
    """Of a frozen block behind nothing that is trained."""
    layers, swap = stack(count=2), swap_of()
    layers[0].requires_grad_(False)
    first, second = tiles(layers, swap)
    y = first(2 * hidden())
    hidden_bytes, lse_bytes = 2 * TOKENS * WIDTH * 8, 2 * TOKENS * HEADS * 8
    assert swap.counters.bytes_to_host < hidden_bytes
    second(y).sum().backward()
    assert swap.counters.bytes_to_device == 2 * hidden_bytes + lse_bytes


def test_a_block_fetches_for_the_one_below_before_it_computes():
    class Recorded(TorchEngine):
        def __init__(self):
            super().__init__(CPU)
            self.sources = []

        def to_device(self, source, target, *, name=""):
            self.sources.append(source.data_ptr())
            return super().to_device(source, target, name=name)

    transfer = Recorded()
    swap = swap_on(transfer)
    entries = [swap.store({0: torch.full((4, 4), float(number))}) for number in range(3)]
    assert torch.equal(entries[2].take()[0], torch.full((4, 4), 2.0))
    assert len(transfer.sources) == 2
    assert torch.equal(entries[1].take()[0], torch.full((4, 4), 1.0))
    assert len(transfer.sources) == 3
    assert torch.equal(entries[0].take()[0], torch.full((4, 4), 0.0))
    assert len(transfer.sources) == len(set(transfer.sources)) == 3


def test_an_input_changed_while_it_is_copied_is_an_error():
    class Late(Ticket):
        def wait(self):
            pass

        def release(self):
            return False

    class Slow(TorchEngine):
        def to_host(self, source, target, *, name=""):
            return Late(self, ((source, target),), name, number=1)

    layers = stack(count=2)
    swap = swap_on(Slow(CPU))
    with pytest.raises(StateChangedError, match="changed in place while it was copied"):
        step(layers, tiles(layers, swap))


def test_an_abandoned_step_gives_host_memory_back():
    layers, swap = stack(), swap_of()
    forwards = tiles(layers, swap)
    x = hidden().requires_grad_()
    for forward in forwards:
        x = forward(x)
    assert swap.pool.in_use > 0
    del x
    gc.collect()
    assert swap.pool.in_use == 0
    expected = step(layers, tiles(layers, None))
    assert all(torch.equal(a, b) for a, b in zip(step(layers, forwards), expected, strict=True))


def test_the_budget_is_exact():
    layers = stack(count=1)
    need = 2 * slot_bytes(2 * TOKENS * WIDTH * 8) + slot_bytes(2 * TOKENS * HEADS * 8)
    step(layers, tiles(layers, swap_of(need)))
    swap = swap_of(need - 1)
    with pytest.raises(HostLimitError):
        step(layers, tiles(layers, swap))
    assert swap.pool.in_use == 0


def test_dense():
    x = torch.zeros(3, 4, 5)
    assert is_dense(x)
    assert is_dense(x.transpose(0, 2))
    assert is_dense(x[1:2])
    assert not is_dense(x[:, 1:])
    assert not is_dense(x[..., ::2])
    assert not is_dense(x[:1].expand(3, 4, 5))
    assert not is_dense(x[:0])
