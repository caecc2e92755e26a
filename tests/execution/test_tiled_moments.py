"""What is alive at full length while a block runs by tiles is what ``tiled_moments`` and docs/tiled.md say."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from memo_runtime.blocks.call import BlockCall
from memo_runtime.execution.compilers import run_eagerly
from memo_runtime.execution.tiled import TiledBlock, Way
from memo_runtime.execution.tiled_cache import ProgramCache
from memo_runtime.execution.tiled_profile import tiled_profile
from memo_runtime.execution.tiled_run import Run
from tests.exactness.hand_written import merge_heads
from tests.execution.alive import Alive

TOKENS, WIDTH, HEADS = 64, 32, 4


class Grouped(nn.Module):
    """A decoder layer with ``shared`` heads of keys and values."""

    def __init__(self, shared):
        super().__init__()
        self.shared = shared
        self.norm = nn.LayerNorm(WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.keys = nn.Linear(WIDTH, 2 * shared * WIDTH // HEADS)
        self.merge = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x):
        h = self.norm(x)
        query = self.query(h).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        key, value = (part.unflatten(-1, (self.shared, -1)).transpose(1, 2) for part in self.keys(h).chunk(2, -1))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.shared < HEADS)
        x = x + self.merge(merge_heads(mixed))
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize(("shared", "counts"), [(4, (3, 1, 8)), (1, (1.5, 1, 5))])
def test_the_worst_moments_are_those_of_the_table(shared, counts):
    torch.manual_seed(0)
    block = Grouped(shared).double()
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    tiled = TiledBlock(block, tile=4)
    call = BlockCall.of((x,), {})
    takes = tiled_profile(tiled.captured(call), call)
    unit = x.numel() * x.element_size()
    forward = [moment.full.at(TOKENS) / unit for moment in takes.forward]
    backward = [moment.full.at(TOKENS) / unit for moment in takes.backward]
    attention, last, worst = counts
    # Of each segment the first tile, which is written to what holds all of them, what is left of it, and later ones.
    assert forward == [*[attention] * 6, attention, *[last] * 6]
    assert max(backward) == worst
    assert backward[:6] == [1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(("shared", "worst"), [(4, (3, 8)), (2, (2, 6))])
def test_by_groups_of_heads_what_is_whole_is_what_the_segments_need(shared, worst):
    """Beside x and o: dx over dy, and do, whose place dq takes; with as many heads of keys as of queries dv too."""
    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    call = BlockCall.of((x,), {})
    tiled = TiledBlock(Grouped(shared).double(), tile=4)
    takes = tiled_profile(tiled.captured(call), call)
    unit = x.numel() * x.element_size()
    assert max(moment.full.at(TOKENS) / unit for moment in takes.backward_by_groups) == worst[0]
    lse = HEADS * TOKENS * 8 / unit  # a group's copy of it, where rows of several sequences do not lie together
    assert max(moment.part.at(TOKENS) / unit for moment in takes.backward_by_groups) == worst[1] + lse
    assert max(moment.full.at(TOKENS) / unit for moment in takes.forward_by_groups) == 1


def peak_of(tiled, x, grad, monkeypatch, *, held):
    """(most bytes of full length by phase, those after the forward), beside what was there before."""
    gc.collect()
    alive = Alive(least=TOKENS * WIDTH * 8)
    for name in ("forward", "backward"):
        original = getattr(Run, name)

        def noted(self, *args, name=name, original=original):
            alive.phase = name
            return original(self, *args)

        monkeypatch.setattr(Run, name, noted)
    with alive:
        y = tiled(x) if held else tiled(x) * 3.0
        made = alive.now
        y.backward(grad)
    return alive.peaks, made


@pytest.mark.parametrize("held", [True, False])
def test_that_many_bytes_are_alive_while_a_block_runs(held, monkeypatch):
    """Where the caller holds dy, dx cannot be written over it; where a product behind the block makes it, it is."""
    torch.manual_seed(0)
    block = Grouped(HEADS).double()
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    tiled = TiledBlock(block, tile=4)
    grad = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    tiled(x).backward(grad)
    x.grad, unit = None, x.numel() * x.element_size()
    for one in block.parameters():
        one.grad = None
    peaks, made = peak_of(tiled, x, grad, monkeypatch, held=held)
    assert made == 2 * unit  # o and y, or the product in its place: lse is smaller
    sums = sum(one.numel() * 8 for one in (block.up.weight, block.down.weight))  # as large as x, and made by then
    # Beside x, o, y: do, q, k, v, dq, dk, dv, and dx beside a dy that was there before, or over one that was not.
    assert peaks["backward"] - made == 8 * unit + sums


@pytest.mark.parametrize(("shared", "worst"), [(4, 3), (2, 2)])
def test_of_full_length_that_many_bytes_are_alive_by_groups(shared, worst, monkeypatch):
    """Beside x, o, y: dx over dy and do, that dq takes the place of; dk and dv take that of o, if there is room."""
    torch.manual_seed(0)
    block = Grouped(shared).double()
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    tiled, unit = TiledBlock(block, tile=4), x.numel() * x.element_size()

    def by_groups(source):
        call = BlockCall.of((source,), {})
        return tiled.run(tiled.captured(call), call, Way(tile=4, groups=2))

    grad = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    by_groups(x).backward(grad)
    x.grad = None
    for one in block.parameters():
        one.grad = None
    peaks, made = peak_of(by_groups, x, grad, monkeypatch, held=False)
    assert made == 2 * unit
    # Those are there until the first segment's backward, the worst moment but for the parts of a group.
    sums = sum(one.numel() * 8 for one in block.parameters() if one.numel() * 8 >= unit)
    assert peaks["backward"] - made == worst * unit + sums


class Watched:
    """A compiler whose programs note how many results of the one before are still alive when they are called."""

    def __init__(self):
        self.left_over = []
        self._results = []

    def __call__(self, graph):
        run = run_eagerly(graph)

        def program(*args):
            self.left_over.append(sum(one() is not None for one in self._results))
            results = run(*args)
            given = {one.untyped_storage().data_ptr() for one in args}
            made = [one for one in results if one.untyped_storage().data_ptr() not in given]
            self._results = [weakref.ref(one) for one in made]
            return results

        return program


def test_what_a_tile_yielded_is_gone_when_the_next_one_runs():
    watched = Watched()
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    tiled = TiledBlock(Grouped(HEADS), tile=16, programs=ProgramCache(watched))
    y = tiled(x)
    watched.left_over.clear()
    y.backward(torch.randn(1, TOKENS, WIDTH))
    assert len(watched.left_over) == 3 * TOKENS // 16
    assert set(watched.left_over) == {0}
