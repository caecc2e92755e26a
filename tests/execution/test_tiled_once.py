"""Gradients of weights where one tile holds all tokens: made in their own precision, summed where there is a sum."""

import pytest
import torch

from memo_runtime.blocks.call import BlockCall
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_gradients import met_once
from tests.capture import blocks
from tests.exactness import hand_written
from tests.exactness.hand_written import WIDTH
from tests.execution.tiles import call_of, run, worst

TOKENS = 64


class Across(hand_written.Attention):
    """One projection before attention and behind it."""

    def forward(self, x):
        return super().forward(x + self.merge(x))


def summed_by(kind):
    """Names of parameters whose gradient is a sum whatever a tile is."""
    block = kind()
    captured = TiledBlock(block, tile=TOKENS).captured(BlockCall.of((torch.randn(2, TOKENS, WIDTH),), {}))
    once = met_once(captured)
    trained = dict(block.named_parameters())
    return {name for node, name in captured.states if name in trained and node not in once}


def test_which_gradients_are_sums():
    assert summed_by(hand_written.Attention) == set()
    assert summed_by(Across) == {"merge.weight", "merge.bias"}
    made = summed_by(hand_written.Normalised)  # made of two parameters, whose gradients come through autograd
    assert {name.partition(".")[0] for name in made} == {"up"}
    assert "bias.weight" in summed_by(blocks.LearnedBias)


@pytest.mark.parametrize("kind", [
    hand_written.Attention, Across,
    *(pytest.param(one, marks=pytest.mark.slow) for one in (hand_written.Normalised, blocks.LearnedBias)),
])  # fmt: skip
def test_one_tile_is_as_near_to_float64s_as_the_block_itself(kind):
    torch.manual_seed(0)
    block, reference = kind().bfloat16(), kind().double()
    reference.load_state_dict(block.state_dict())
    x = torch.randn(2, TOKENS, WIDTH).bfloat16().requires_grad_()
    exact = run(call_of(reference, x.detach().double().requires_grad_()), reference)[1]
    theirs = run(call_of(block, x), block)[1]
    mine = run(call_of(block, x), TiledBlock(block, tile=TOKENS))[1]
    assert worst(mine, exact) <= 1.1 * worst(theirs, exact)


class CastUp(hand_written.Attention):
    """A weight in single precision, used in double."""

    def finish(self, x, mixed):
        up = torch.nn.functional.linear(x.double(), self.up.weight.double(), self.up.bias.double())
        return x + self.merge(mixed) + self.down(torch.nn.functional.silu(up).to(x.dtype))


@pytest.mark.parametrize("tile", [16, pytest.param(TOKENS, marks=pytest.mark.slow)])
def test_products_of_wider_factors_are_rounded_themselves(tile):
    torch.manual_seed(0)
    block = CastUp()
    x = torch.randn(2, TOKENS, WIDTH).requires_grad_()
    theirs, mine = (run(call_of(block, x), one)[1] for one in (block, TiledBlock(block, tile=tile)))
    assert worst(mine, theirs) < 1e-6
    reference = CastUp().double()
    reference.load_state_dict(block.state_dict())
    exact = run(call_of(reference, x.detach().double().requires_grad_()), reference)[1]
    assert worst(mine, exact) <= 1.1 * worst(theirs, exact)


def test_what_was_in_memory_does_not_matter(monkeypatch):
    """The first product is written, not added."""
    made = torch.empty_like

    def spoilt(value, **kwargs):
        found = made(value, **kwargs)
        return found.fill_(float("nan")) if found.is_floating_point() and not found.requires_grad else found

    block = hand_written.Attention().double()
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64).requires_grad_()
    for tile in (16, TOKENS):
        expected = run(call_of(block, x), TiledBlock(block, tile=tile))[1]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", spoilt)
            found = run(call_of(block, x), TiledBlock(block, tile=tile))[1]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
