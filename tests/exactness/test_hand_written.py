"""Blocks that no framework wrote: one peculiarity each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memo_runtime.records import Executor
from tests.exactness import hand_written as blocks
from tests.exactness.compare import (
    MAIN_WAYS,
    MEMO,
    OTHER_WAYS,
    SWAP,
    WAYS,
    Way,
    assert_exact,
    output_loss,
)

MAIN = [
    blocks.TwoMixers,
    blocks.NoMixer,
    blocks.EagerAttention,
    blocks.Convolution,
    blocks.CumulativeSum,
    blocks.OwnPositions,
]
OTHERS = [
    blocks.BufferedMask,
    blocks.Spectrum,
    blocks.Squeeze,
    blocks.TupleOutput,
    blocks.DictOutput,
    blocks.InPlace,
    blocks.CustomFunction,
    blocks.Normalised,
    blocks.Twice,
]


@pytest.mark.parametrize("way", [*MAIN_WAYS, *WAYS[3:]], ids=str)
@pytest.mark.parametrize("kind", MAIN)
def test_every_policy(kind: type[nn.Module], way: Way) -> None:
    assert_exact(blocks.stack_of(kind), {"x": blocks.sequence()}, way, loss_of=output_loss)


@pytest.mark.parametrize("way", OTHER_WAYS, ids=str)
@pytest.mark.parametrize("kind", OTHERS)
def test_main_policies(kind: type[nn.Module], way: Way) -> None:
    assert_exact(blocks.stack_of(kind), {"x": blocks.sequence()}, way, loss_of=output_loss)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", MAIN)
def test_other_batches(kind: type[nn.Module], rows: int) -> None:
    assert_exact(
        blocks.stack_of(kind), {"x": blocks.sequence(rows=rows, tokens=17)}, MEMO, loss_of=output_loss
    )


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
def test_size_that_depends_on_data(way: Way) -> None:
    """Never sliced: with a prefix asked for, the block runs again as a whole and says why."""
    model = blocks.stack_of(blocks.Routed)
    reason = "a slice of its tokens does not run"
    assert_exact(model, {"x": blocks.sequence()}, way, loss_of=output_loss, fallback=reason)


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
def test_length_that_is_asserted(way: Way) -> None:
    """What a block raises on fewer tokens is the reason why it is not sliced."""
    x = blocks.sequence(tokens=24)
    model = blocks.stack_of(blocks.OnlyMultiples)
    assert_exact(model, {"x": x[:, :24]}, way, loss_of=output_loss, fallback="a multiple of 8")


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
def test_gaps_in_memory(way: Way) -> None:
    x = blocks.sequence(tokens=29)
    assert_exact(blocks.stack_of(blocks.CutConvolution), {"x": x}, way, loss_of=output_loss)


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
def test_values_of_the_first_block_used_by_all(way: Way) -> None:
    torch.manual_seed(0)
    model = blocks.SharedStack(*(blocks.SharedValues() for _ in range(3))).double()
    assert_exact(model, {"x": blocks.sequence()}, way, loss_of=output_loss)


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
def test_shared_bias_with_gradients(way: Way) -> None:
    torch.manual_seed(0)
    assert_exact(blocks.Backbone().double(), {"x": blocks.sequence()}, way, loss_of=output_loss)


@pytest.mark.parametrize("way", [SWAP, MEMO], ids=str)
@pytest.mark.parametrize("kind", [blocks.TimeFirst, blocks.Sequential2d])
def test_other_layouts(kind: type[nn.Module], way: Way) -> None:
    x = blocks.sequence(rows=3)
    x = x.transpose(0, 1) if kind is blocks.TimeFirst else x[0]
    assert_exact(blocks.stack_of(kind), {"x": x}, way, loss_of=output_loss)


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
def test_gradient_of_the_input(way: Way) -> None:
    """The first block's input is a leaf that requires grad."""
    torch.manual_seed(0)
    model = blocks.Stack(blocks.Attention(), blocks.Attention(), embed=False).double()
    assert_exact(model, {"x": blocks.sequence(grad=True)}, way, loss_of=output_loss)


@pytest.mark.parametrize("way", [SWAP, MEMO], ids=str)
def test_input_with_gaps_in_memory(way: Way) -> None:
    torch.manual_seed(0)
    model = blocks.Stack(blocks.Attention(), blocks.Attention(), embed=False).double()
    x = torch.cat((blocks.sequence(), blocks.sequence()), dim=-1)[..., 5 : 5 + blocks.WIDTH]
    assert_exact(model, {"x": x}, way, loss_of=output_loss)


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
def test_lengths_that_equal_other_sizes(way: Way) -> None:
    """As many tokens as features, and as many sequences as tokens of a head."""
    x = blocks.sequence(rows=blocks.WIDTH // blocks.HEADS, tokens=blocks.WIDTH)
    assert_exact(blocks.stack_of(blocks.Attention), {"x": x}, way, loss_of=output_loss)


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
def test_named_blocks_in_a_plain_module(way: Way) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = blocks.Attention()
            self.second = blocks.CumulativeSum()

        def forward(self, x: Tensor) -> Any:
            return self.second(self.first(x))

    torch.manual_seed(0)
    model = Plain().double()
    assert_exact(
        model, {"x": blocks.sequence()}, way, loss_of=output_loss, blocks=["first", "second"], executor=Executor.REPLAY
    )
