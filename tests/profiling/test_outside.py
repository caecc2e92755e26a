"""What the plan reserves for the part of a step behind the blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memo_runtime.profiling.outside import outside_peak
from memo_runtime.records import BlockProfile

TOKENS, HIDDEN_BYTES = 64, 64 * 16 * 4


def profiles(count: int) -> list[BlockProfile]:
    return [
        BlockProfile(name=f"layers.{i}", kind="Linear", stack=0, tokens=TOKENS, token_dim=1, input_leaf=0, reason="")
        for i in range(count)
    ]


class Stack(nn.Module):
    def __init__(self, **behind: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.rotary = nn.Identity()
        for name, module in behind.items():
            setattr(self, name, module)


def peak(model: nn.Module, *, tiled_loss: bool = False) -> int:
    return outside_peak(model, profiles(2), 1, HIDDEN_BYTES, tiled_loss=tiled_loss).at(TOKENS)


def test_a_model_that_ends_with_its_blocks_needs_the_last_state_and_its_gradient() -> None:
    assert peak(Stack()) == 2 * HIDDEN_BYTES


def test_a_final_norm_needs_its_copies() -> None:
    assert peak(Stack(norm=nn.LayerNorm(16))) == 5 * HIDDEN_BYTES


def test_a_scale_of_the_model_itself_counts_as_something_behind() -> None:
    model = Stack()
    model.scale = nn.Parameter(torch.ones(16))
    assert peak(model) == 5 * HIDDEN_BYTES


@pytest.mark.parametrize("tiled_loss", [False, True])
def test_a_head_makes_logits_unless_the_loss_is_tiled(tiled_loss: bool) -> None:
    logits = 0 if tiled_loss else TOKENS * 100 * 2 * (4 + 4)
    assert peak(Stack(head=nn.Linear(16, 100)), tiled_loss=tiled_loss) == 5 * HIDDEN_BYTES + logits
