"""Attention by groups of heads: exact for every kind of attention, and refused or left whole where it cannot be."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from statistics import median

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.spans import spans_tensor
from memo_runtime.execution.mixers.attention import Kernel
from memo_runtime.execution.mixers.masked import masked_attention
from memo_runtime.execution.stash import Tools
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_heads import group_sizes, grouping, head_count
from memo_runtime.execution.tiled_swap import TiledSwap
from tests.capture import blocks
from tests.exactness import hand_written
from tests.exactness.hand_written import HEADS, WIDTH, merge_heads
from tests.execution.test_tiled import double, hidden
from tests.execution.tiles import assert_exact, call_of, run, worst


class ByGroups(TiledBlock):
    """Tiles with attention by ``groups`` of heads, queries ``queries`` at a time."""

    def __init__(self, block, *, groups=1, queries=0, **settings):
        super().__init__(block, tile=8, alpha=0.5, **settings)
        self.groups = groups
        self.queries = queries

    def way(self):
        return replace(super().way(), groups=self.groups)

    def captured(self, call):
        found = super().captured(call)
        for node in found.attentions:
            self.programs.kernels[found.signature, node.name] = Kernel("cpu", self.queries)
        return found


@cache
def tiles_of(**settings):
    """One capture for many tests."""
    return ByGroups(made(**settings))


def grouped(groups, queries=0, **settings):
    tiled = tiles_of(**settings)
    tiled.groups, tiled.queries = groups, queries
    return tiled


class Shared(nn.Module):
    """A decoder layer with norms of queries (whose products backward needs) and heads that share keys and values."""

    def __init__(self, heads=8, keys=4, *, depth=4, causal=True, drop=0.0, scale=None, yields=False):
        super().__init__()
        self.heads, self.keys, self.causal, self.drop, self.scale = heads, keys, causal, drop, scale
        self.yields = yields
        self.norm = nn.LayerNorm(WIDTH)
        self.queries = nn.Linear(WIDTH, heads * depth)
        self.both = nn.Linear(WIDTH, 2 * keys * depth, bias=False)
        self.own = nn.LayerNorm(depth)
        self.merge = nn.Linear(heads * depth, WIDTH)

    def forward(self, x, mask=None):
        h = self.norm(x)
        query = self.own(self.queries(h).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        key, value = (part.unflatten(-1, (self.keys, -1)).transpose(1, 2) for part in self.both(h).chunk(2, -1))
        mixed = scaled_dot_product_attention(
            query, key, value, mask, is_causal=self.causal and mask is None, dropout_p=self.drop, scale=self.scale,
            enable_gqa=self.keys < self.heads,
        )  # fmt: skip
        x = x + self.merge(merge_heads(mixed))
        return (x, key) if self.yields else x


def made(**settings):
    torch.manual_seed(0)
    return Shared(**settings).double()


@pytest.mark.parametrize(
    ("keys", "causal"),
    [(4, True), (8, False), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((4, False), (8, True)))],
)
def test_groups_are_exact(keys, causal):
    for groups in (2, 4):
        tiled = grouped(groups, keys=keys, causal=causal, scale=0.7)
        assert_exact(call_of(tiled.block, hidden()), tiled)
        assert tiled.kernels == [f"cpu, {groups} groups"]


@pytest.mark.parametrize(
    ("shape", "boolean"),
    [((3, 8, 29, 29), False), ((3, 1, 29, 29), True),
     *(pytest.param(*one, marks=pytest.mark.slow) for one in (((29, 29), True), ((3, 8, 29, 29), True)))],
)  # fmt: skip
def test_masks_of_all_heads_and_of_each(shape, boolean):
    block = made()
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(shape, generator=generator, dtype=torch.float64)
    mask = (mask > 0.3) | torch.eye(29, dtype=torch.bool) if boolean else mask
    assert_exact(call_of(block, hidden(), mask), ByGroups(block, groups=4))


@pytest.mark.parametrize(
    "kind",
    [hand_written.TwoMixers, blocks.DocumentMask,
     *(pytest.param(one, marks=pytest.mark.slow) for one in
       (hand_written.Normalised, hand_written.Twice, hand_written.TimeFirst, blocks.PassThrough))],
    ids=lambda kind: kind.__name__,
)  # fmt: skip
def test_blocks_of_every_kind(kind):
    block = double(kind)
    more = [torch.tensor([0] * 7 + [1] * 12 + [2] * 10).expand(3, -1)] if kind is blocks.DocumentMask else []
    assert_exact(call_of(block, hidden(), *more), ByGroups(block, groups=2))


class Spanned(Shared):
    """The same under spans: each query sees one run of keys."""

    def forward(self, x, spans):
        h = self.norm(x)
        query = self.own(self.queries(h).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        key, value = (part.unflatten(-1, (self.keys, -1)).transpose(1, 2) for part in self.both(h).chunk(2, -1))
        return x + self.merge(merge_heads(masked_attention(query, key, value, spans, 0.4)))


def test_packed_documents_and_windows_as_spans():
    torch.manual_seed(0)
    block = Spanned().double()
    places = torch.arange(29)
    starts = torch.tensor([0] * 7 + [7] * 12 + [19] * 10)
    spans = spans_tensor(torch.maximum(starts, places - 5)[None], places[None] + 1)
    tiled = ByGroups(block, groups=4)
    assert_exact(call_of(block, hidden(), spans), tiled)
    assert tiled.kernels == ["memo_runtime::masked_attention, 4 groups"]


def test_keys_that_the_block_yields_are_there_whole():
    block = made(yields=True)
    assert_exact(call_of(block, hidden()), ByGroups(block, groups=4))


@pytest.mark.slow
def test_values_of_another_block_get_their_gradient():
    block = double(hand_written.SharedValues)
    first = torch.randn(3, HEADS, 29, WIDTH // HEADS, dtype=torch.float64, requires_grad=True)
    assert_exact(call_of(block, hidden(), first), ByGroups(block, groups=2))


@pytest.mark.slow
@pytest.mark.parametrize("others", [29, 11])
def test_attention_to_other_tokens(others):
    block = double(blocks.Cross)
    keys = torch.randn(3, others, WIDTH, dtype=torch.float64, requires_grad=True)
    assert_exact(call_of(block, hidden(), keys), ByGroups(block, groups=2))


def test_dropout_draws_the_same_twice():
    """Backward starts from the seeds that the groups' forward had: gradients are those of finite differences."""
    block, x = made(drop=0.5), hidden(13, rows=1)
    tiled = ByGroups(block, groups=4)

    def loss(values):
        torch.manual_seed(3)
        return tiled(values).square().sum()

    (grad,) = torch.autograd.grad(loss(x), x)
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 1e-5
    with torch.no_grad():
        pair = [(x + sign * step).requires_grad_() for sign in (1, -1)]
    slope = float((loss(pair[0]) - loss(pair[1])).detach()) / 2
    assert slope == pytest.approx(float((grad * step).sum()), rel=1e-6)


@pytest.mark.parametrize("held", [True, False])
def test_a_second_backward_finds_what_the_first_did(held):
    """With ``retain_graph`` nothing is written over the result of attention, on the device or fetched."""
    tiled, x = grouped(4, scale=0.7, keys=4, causal=True), hidden()
    block, swap = tiled.block, None
    if not held:
        tools = Tools(torch.device("cpu"), 1 << 24)
        swap = TiledSwap(tools.device, tools.pool, tools.engine)
    call = BlockCall.of((x,), {})
    loss = tiled.run(tiled.captured(call), call, replace(tiled.way(), swap=swap)).square().sum()
    wanted = [x, *block.parameters()]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    expected = torch.autograd.grad(block(x).square().sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert worst(first, expected) <= 1e-12


@pytest.mark.parametrize("groups", [1, 2])
def test_queries_in_chunks_are_exact(groups):
    for queries in (5, 8, 28, 29):
        tiled = grouped(groups, queries, keys=4, causal=True, scale=0.7)
        assert_exact(call_of(tiled.block, hidden()), tiled)
        told = ["cpu", *(["2 groups"] if groups > 1 else []), *([f"queries by {queries}"] if queries < 29 else [])]
        assert tiled.kernels == [", ".join(told)]


@pytest.mark.parametrize("settings", [{}, pytest.param({"causal": True, "drop": 0.3}, marks=pytest.mark.slow)])
def test_chunks_are_for_causal_attention_without_dropout(settings):
    tiled = grouped(1, 8, **({"keys": 8, "causal": False, "scale": 0.7} | settings))
    tiled(hidden()).sum().backward()
    assert "queries" not in tiled.kernels[0]


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "queries"), [(1, 64), (4, 0), (4, 128)])
def test_in_bfloat16_gradients_are_as_near_to_float64s_as_the_blocks_own(groups, queries):
    ratios = []
    for seed in range(5):
        torch.manual_seed(seed)
        block, exact = Shared(depth=16).bfloat16(), Shared(depth=16).double()
        exact.load_state_dict(block.state_dict())
        x = torch.randn(1, 512, WIDTH).bfloat16()
        calls = [call_of(one, x.to(kind).requires_grad_()) for one, kind in
                 ((exact, torch.float64), (block, torch.bfloat16), (block, torch.bfloat16))]  # fmt: skip
        forwards = (exact.forward, block.forward, ByGroups(block, groups=groups, queries=queries))
        want, plain, mine = (run(call, forward)[1] for call, forward in zip(calls, forwards, strict=True))
        ratios.append(distance(mine, want) / distance(plain, want))
    assert median(ratios) <= 1.1


def distance(found, exact):
    """Of all gradients taken together."""
    pairs = zip(found, exact, strict=True)
    return sum(float((a.detach().double() - b.detach()).square().sum()) for a, b in pairs) ** 0.5


def test_attention_that_has_no_groups_stays_whole():
    """Its bias of all pairs wants a gradient."""
    block = double(hand_written.Biased)
    bias = torch.randn(1, HEADS, 29, 29, dtype=torch.float64, requires_grad=True)
    tiled = ByGroups(block, groups=2)
    assert head_count(tiled.captured(BlockCall.of((hidden(),), {"bias": bias}))) == 1
    assert_exact(call_of(block, hidden(), bias=bias), tiled)
    assert tiled.kernels == ["rows"]


def test_numbers_of_groups_divide_the_heads_of_keys():
    tiled = ByGroups(made(heads=12, keys=6), groups=4)
    captured = tiled.captured(BlockCall.of((hidden(),), {}))
    assert head_count(captured) == 6
    assert group_sizes(6) == (1, 2, 3, 6)
    assert_exact(call_of(tiled.block, hidden()), tiled)
    assert tiled.kernels == ["cpu"]
    how = grouping(captured, 1)
    assert how is not None
    assert (how.shared, how.over_result, how.over_gradient) == (2, ("key", "value"), True)
