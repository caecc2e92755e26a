"""A block that saves parts of a larger storage: left as they are that stays whole, and is counted so, once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.records import Action, Role
from tests.execution.alive import Alive


class Cut(nn.Module):
    """Its sine saves a sixteenth of what the projection made."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.up, self.down = nn.Linear(width, 16 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.sin(self.up(x)[..., : self.width]))


class Parts(nn.Module):
    """Saves two of three parts of one projection, and of another one only the first token."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 6 * width), nn.Linear(2 * width, width)
        self.other = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, _, up = self.up(x).chunk(3, -1)
        return x + self.down(torch.sin(gate) * up) * torch.cos(self.other(x)[:, :1])


class Stack(nn.Module):
    def __init__(self, kind: type[nn.Module] = Cut) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 8)
        self.layers = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def test_with_room_for_everything_a_part_is_copied_and_what_is_whole_is_left():
    stack, x = Stack(), torch.randn(2, 256, 8)
    plain = copy.deepcopy(stack)
    profile = memo.profile(stack, (x,))
    plan = memo.plan(profile, policy="replay", keep_last=0, budget="1GiB")
    for block, planned in zip(profile.blocks, plan.blocks, strict=True):
        done = {action for group, action in zip(block.groups, planned.actions, strict=True)
                if group.role is Role.TOKEN and group.saved and group.storage}  # fmt: skip
        whole = {action for group, action in zip(block.groups, planned.actions, strict=True)
                 if group.role is Role.TOKEN and group.saved and not group.storage}  # fmt: skip
        assert (done, whole) == ({Action.PREFIX}, {Action.KEEP})
    memo.wrap(stack, plan=plan)
    for one in (stack, plain):
        one(x).square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(stack.parameters(), plain.parameters(), strict=True))
    totals = memo.report(stack).totals
    assert totals.bytes_kept == totals.forecast.bytes_kept
    assert totals.stash_peak_bytes == totals.forecast.stash_peak_bytes


@pytest.mark.parametrize("kind", [Cut, Parts])
def test_what_stays_of_blocks_that_are_left_as_they_are(kind):
    """At the profiled length and at another."""
    planned = memo.wrap(Stack(kind), policy="swap", keep_last=3)
    for tokens in (256, 320):
        x, stack, alive = torch.randn(2, tokens, 8), Stack(kind), Alive()
        with alive:
            result = stack(x)
        planned(x).square().mean().backward()
        # Behind the blocks there are the input of the last product and its result.
        assert memo.report(planned).totals.forecast.bytes_kept == alive.now - 4 * 2 * tokens * 32 - result.nbytes


@pytest.mark.parametrize("how", [{"policy": "none"}, {"policy": "recompute", "keep_last": 1},
                                 {"policy": "memo", "alpha": 0.0}, {"policy": "memo", "alpha": 0.5},
                                 {"policy": "swap"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", [Cut, Parts])
def test_what_a_step_holds_is_as_planned(kind, how):
    stack, x = memo.wrap(Stack(kind), **how), torch.randn(2, 256, 8)
    for _ in range(2):
        stack(x).square().mean().backward()
        totals = memo.report(stack).totals
        assert totals.bytes_kept == totals.forecast.bytes_kept
        assert totals.stash_peak_bytes == totals.forecast.stash_peak_bytes
