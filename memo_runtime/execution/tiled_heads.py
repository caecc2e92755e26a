"""Attention by groups of heads: which attention can run so, and the part of a tensor that belongs to one group.

Heads of keys and values, each with the heads of queries that share it, meet no others: attention of some of them is
attention. So only queries, keys and values of one group, and their gradients, have to be there at full length at a
time. The segment that makes them runs once for each group, and what is not this group's of its results is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from memo_runtime.blocks.operators import MASKED_ATTENTION
from memo_runtime.capture.captured import Captured
from memo_runtime.capture.rules import arguments_of, operator_name
from memo_runtime.capture.split import Mixer, Segment

#: Dimension of the heads in queries, keys, values and results.
HEADS = 1
_ARGUMENTS = ("query", "key", "value")


@dataclass(frozen=True, slots=True)
class Heads:
    """Group ``number`` of ``count``."""

    number: int
    count: int

    def of(self, tensor: torch.Tensor, dim: int = HEADS) -> torch.Tensor:
        """The group's part of ``tensor``, which has all heads in dimension ``dim``: a view."""
        size = tensor.shape[dim] // self.count
        return tensor.narrow(dim, self.number * size, size)

    def of_mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Likewise of a mask, which may be one for all heads."""
        if mask is None or mask.dim() < 3 or mask.shape[-3] == 1:
            return mask
        return self.of(mask, -3)


@dataclass(frozen=True, slots=True)
class Grouping:
    """An attention that can run by groups.

    Args:
        mixer: it, and what it yields: result. segment: its number among the stages is one less, and it makes queries,
            keys or values. mask: the mask or the spans.
        sliced: results of the segment of which only one group exists at a time. The others are yielded by the block.
        heads: of keys and values; every number of groups divides them. shared: heads of queries to each.
        over_result: whose gradients, by argument, have room in the result, which nothing reads afterwards: each head of
            queries that shares one of keys leaves room for one. over_gradient: queries have in the result's gradient.
    """

    mixer: Mixer
    result: fx.Node
    mask: fx.Node | None
    segment: Segment
    sliced: frozenset[fx.Node]
    heads: int
    shared: int
    over_result: tuple[str, ...]
    over_gradient: bool

    def groups(self, count: int) -> Iterator[Heads]:
        """All of ``count``."""
        return (Heads(number, count) for number in range(count))


def grouping(captured: Captured, index: int) -> Grouping | None:
    """How stage number ``index`` can run by groups of heads; None: it is no attention that can.

    Its queries, keys and values are made for it by a segment, there is more than one head of keys, and its mask needs
    no gradient, which would be a sum over all groups.
    """
    stages = captured.stages
    mixer, before = stages.stages[index], stages.stages[index - 1] if index else None
    if not isinstance(mixer, Mixer) or not isinstance(before, Segment) or before.by_rows:
        return None
    if mixer.by_graph and operator_name(mixer.node) != MASKED_ATTENTION:
        return None
    named = arguments_of(mixer.node)
    mask = named["spans" if mixer.by_graph else "attn_mask"]
    given: list[fx.Node] = [named[name] for name in _ARGUMENTS]
    shapes = [one.meta["val"].shape for one in given]
    if any(len(shape) != 4 for shape in shapes) or mask in stages.differentiable:
        return None
    queries, heads = int(shapes[0][HEADS]), int(shapes[1][HEADS])
    if heads < 2 or int(shapes[2][HEADS]) != heads or queries % heads:
        return None
    made = {one for one in given if one in before.outputs and one not in captured.outputs}
    results = mixer.results
    if not made or len(results) != 1 or results[0][1]:
        return None
    result = results[0][0]
    alone = len(set(given)) == len(given) and made == set(given)
    depths = {int(shape[-1]) for shape in shapes}
    same = len(depths) == 1 and {one.meta["val"].dtype for one in given} == {result.meta["val"].dtype}
    over = alone and same and result not in captured.outputs
    return Grouping(
        mixer=mixer,
        result=result,
        mask=mask,
        segment=before,
        sliced=frozenset(made),
        heads=heads,
        shared=queries // heads,
        over_result=("key", "value")[: queries // heads] if over else (),
        over_gradient=over,
    )


def head_count(captured: Captured) -> int:
    """Heads of keys that the number of groups has to divide; 1: no attention of the block can run by groups."""
    found = [grouping(captured, index) for index in range(len(captured.stages.stages))]
    return math.gcd(*(one.heads for one in found if one is not None)) or 1


def group_sizes(heads: int) -> tuple[int, ...]:
    """Numbers of groups that ``heads`` can be divided into, the fewest first."""
    return tuple(count for count in range(1, heads + 1) if heads % count == 0)


def all_heads(part: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for all heads where ``part`` is one of ``groups``: token-major, as fused kernels lay results out."""
    batch, heads, tokens, depth = part.shape
    return part.new_empty(batch, tokens, heads * groups, depth, dtype=dtype).transpose(1, 2)


#: A group of heads, and the values of which it is alone.
HeadPart = tuple[Heads, frozenset[fx.Node]]


def part_of(result: torch.Tensor, node: fx.Node, part: HeadPart) -> torch.Tensor | None:
    """What of ``result``, a tile of ``node``'s value, is wanted; None: nothing, since the first group has left it."""
    group, sliced = part
    if node in sliced:
        return group.of(result)
    return result if group.number == 0 else None
