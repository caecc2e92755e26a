"""Saved tensors in which one element stands for all tokens: expanded along tokens, they have a length and no rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Gamma
from torch.nn import functional

from tests.exactness import hand_written as blocks
from tests.exactness.compare import MAIN_WAYS, SWAP, Way, assert_exact, output_loss, plan_of


class ChannelAttention(blocks.Part):
    """Attention of channels to channels, with queries and keys of length one over the tokens (XCiT)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(-1, -2) for part in self.heads(x))
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.finish(x, blocks.merge_heads(mixed.transpose(-1, -2)))


class ExpandedGate(blocks.Attention):
    """A gate for all tokens, made from their mean, saved beside the tensor that it is expanded from."""

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(x.mean(1, keepdim=True))
        return self.finish(x, self.mix(x) * gate.expand_as(x) + (gate * gate))


class Rate(blocks.Attention):
    """Draws from a distribution of which one number is expanded to all values."""

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(x)
        return self.finish(x, mixed * Gamma(mixed.abs() + 1, 2.0).rsample())


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
@pytest.mark.parametrize("kind", [ChannelAttention, ExpandedGate, Rate])
def test_saved_by_a_block(kind: type[nn.Module], way: Way) -> None:
    assert_exact(blocks.stack_of(kind), {"x": blocks.sequence()}, way, loss_of=output_loss)


def test_bytes_of_an_expanded_tensor_do_not_grow() -> None:
    """They are planned as what lies in memory, at any length."""
    model = blocks.stack_of(ExpandedGate)
    assert_exact(model, {"x": blocks.sequence()}, SWAP, loss_of=output_loss)
    whole = [group for group in plan_of(model).profile.blocks[0].groups if group.role == "whole"]
    assert whole
    assert all(group.size.linear == group.size.quadratic == 0 for group in whole)


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
def test_input_of_the_first_block(way: Way) -> None:
    torch.manual_seed(0)
    model = blocks.Stack(blocks.Attention(), blocks.Attention(), embed=False).double()
    x = blocks.sequence()[:, :1].expand(-1, 33, -1)
    assert_exact(model, {"x": x}, way, loss_of=output_loss)
