"""A block that saves a part of a larger storage: left as it is that would stay whole, so what it saves is copied."""

from __future__ import annotations

import copy

import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.records import Action, Role


class Cut(nn.Module):
    """Its sine saves a sixteenth of what the projection made."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.up, self.down = nn.Linear(width, 16 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.sin(self.up(x)[..., : self.width]))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 8)
        self.layers = nn.ModuleList(Cut() for _ in range(3))

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
                if group.role is Role.TOKEN and group.saved and not group.fills}  # fmt: skip
        whole = {action for group, action in zip(block.groups, planned.actions, strict=True)
                 if group.role is Role.TOKEN and group.saved and group.fills}  # fmt: skip
        assert (done, whole) == ({Action.PREFIX}, {Action.KEEP})
    memo.wrap(stack, plan=plan)
    for one in (stack, plain):
        one(x).square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(stack.parameters(), plain.parameters(), strict=True))
    totals = memo.report(stack).totals
    assert totals.bytes_kept == totals.forecast.bytes_kept
    assert totals.stash_peak_bytes == totals.forecast.stash_peak_bytes
