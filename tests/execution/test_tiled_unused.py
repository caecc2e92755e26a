"""Results that nobody uses: by tiles, gradients are ``None`` where those of the block itself are."""

from __future__ import annotations

import copy
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import memo_runtime as memo
from memo_runtime.records import Executor
from tests.execution.test_tiled_heads import ByGroups
from tests.execution.tiles import TOLERANCE, worst

WIDTH, HEADS = 16, 4


class Aside(nn.Module):
    """Beside its result: a head of its input, one of what it attends to, and one of another argument."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.head, self.mixed, self.other = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.register_buffer("scale", torch.ones(WIDTH, dtype=torch.float64).requires_grad_())

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True)

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, ...]:
        parts = self.qkv(self.norm(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        found = self.attend(*parts).transpose(1, 2).reshape(x.shape)
        y = x + found
        rest = () if given is None else (self.other(given),)
        return y + self.up(y).tanh(), self.head(x) * self.scale, self.mixed(found), *rest


class Written(Aside):
    """Attention written out."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.transpose(-1, -2)).softmax(-1) @ value


def gradients(block: nn.Module, forward: Any, used: tuple[int, ...]) -> list[Tensor | None]:
    """Of both arguments, parameters and the buffer, where results number ``used`` are used."""
    generator = torch.Generator().manual_seed(1)
    x, other = (torch.randn(2, 29, WIDTH, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    results = forward(x, given=other)
    loss = sum(results[number].sin().sum() for number in used)
    wanted = [x, other, *block.parameters(), *block.buffers()]
    return list(torch.autograd.grad(loss, wanted, allow_unused=True))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [Aside, Written])
def test_a_gradient_is_none_where_the_block_has_none(kind: type[Aside], groups: int) -> None:
    torch.manual_seed(0)
    block = kind().double()
    tiled = ByGroups(block, groups=groups)
    for count in (1, 2, 3, 4):
        for used in combinations(range(4), count):
            theirs, mine = (gradients(block, one, used) for one in (block, tiled))
            assert count == 4 or None in theirs
            assert worst(mine, theirs) <= TOLERANCE, used


class Stack(nn.Module):
    """Uses the head of its last block alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Aside() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, head, _ = block(x)
        return x + head


def test_an_optimizer_leaves_alone_what_nobody_uses() -> None:
    torch.manual_seed(0)
    plain = Stack().double()
    tiled = copy.deepcopy(plain)
    x = torch.randn(2, 29, WIDTH, dtype=torch.float64)
    assert memo.check(copy.deepcopy(plain), (x,), policy="tiled", tile=8).ok
    memo.wrap(tiled, policy="tiled", tile=8, alpha=0.5)
    before = plain.blocks[0].head.weight.detach().clone()
    for model in (plain, tiled):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).sin().sum().backward()
            optimizer.step()
    assert {block.executor for block in memo.report(tiled).blocks} == {Executor.TILED}
    assert torch.equal(tiled.blocks[0].head.weight, before)
    for mine, theirs in zip(tiled.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert (mine - theirs).norm() <= TOLERANCE * theirs.norm()
