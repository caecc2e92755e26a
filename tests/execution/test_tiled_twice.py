"""Gradients of gradients by tiles are refused, whichever inputs the second pass is asked for."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution.tiled import TiledBlock
from tests.exactness import hand_written
from tests.exactness.hand_written import WIDTH

REFUSED = r"by tiles, and the gradients.*policy='replay'"


class Held:
    """Something that goes with the node that holds it."""


def double(kind=hand_written.Attention):
    torch.manual_seed(0)
    return kind().double().train()


def hidden(seed=1):
    return torch.randn(2, 19, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaf(seed=1):
    return hidden(seed).requires_grad_()


def test_a_penalty_on_the_slope_is_refused_for_parameters_alone():
    """As ``autograd.grad`` is called for them: its pass leaves out whatever does not lead to one of them."""
    block, x = double(), leaf()
    y = TiledBlock(block, tile=8)(x)
    (slope,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(y.mean() + slope.square().sum(), list(block.parameters()))


@pytest.mark.parametrize("part", ["", "up.weight"])
def test_products_with_the_hessian_are_refused_for_any_parameter(part):
    block = double()
    x, wanted = hidden(), [one for name, one in block.named_parameters() if part in name]
    loss = TiledBlock(block, tile=8)(x).square().mean()
    gradients = torch.autograd.grad(loss, wanted, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(sum(one.sum() for one in gradients), wanted)


def test_backward_to_some_inputs_is_refused():
    block, x = double(), leaf()
    (slope,) = torch.autograd.grad(TiledBlock(block, tile=8)(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        slope.square().sum().backward(inputs=[x])


def test_a_frozen_block_refuses_for_its_input():
    block, x = double().requires_grad_(False), leaf()
    (slope,) = torch.autograd.grad(TiledBlock(block, tile=8)(x.exp()).tanh().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(slope.square().sum(), x)


def test_a_block_of_several_results_refuses():
    block, x = double(hand_written.DictOutput), leaf()
    results = [one for one in TiledBlock(block, tile=8)(x).values() if isinstance(one, torch.Tensor)]
    (slope,) = torch.autograd.grad(sum(one.tanh().sum() for one in results), x, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(slope.sum(), next(iter(block.parameters())))


def test_what_the_gradient_that_came_in_depends_on_refuses():
    """Also where nothing of the block is asked for: its gradient is linear in the one that comes."""
    block, x, factor = double(), leaf(), leaf(2)
    (slope,) = torch.autograd.grad((TiledBlock(block, tile=8)(x) * factor).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(slope.sum(), factor)


def test_a_second_pass_that_does_not_lead_through_tiles_is_exact():
    """Gradients of a head behind the block, differentiated again: the block goes backward once, a second time."""
    block, x, factor = double(), leaf(), leaf(2)

    def penalty(forward):
        y = forward(x)
        (slope,) = torch.autograd.grad((y * factor.square()).sum(), factor, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [x, factor, block.up.weight])

    for mine, theirs in zip(penalty(TiledBlock(block, tile=8)), penalty(block), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_that_are_kept_with_a_graph_are_those_of_the_block():
    block, x = double(), leaf()
    wanted = [x, *block.parameters()]
    mine = torch.autograd.grad(TiledBlock(block, tile=8)(x).square().sum(), wanted, create_graph=True)
    for one, other in zip(mine, torch.autograd.grad(block(x).square().sum(), wanted), strict=True):
        torch.testing.assert_close(one.detach(), other)


def test_several_gradients_at_once_are_refused():
    block, x = double(), leaf()
    y = TiledBlock(block, tile=8)(x)
    several = torch.stack([torch.ones_like(y)] * 3)
    with pytest.raises(CaptureRefusedError, match=r"several at once.*retain_graph=True.*policy='replay'"):
        torch.autograd.grad(y, x, several, is_grads_batched=True)


def test_a_call_goes_with_its_result():
    """Its way to its own node is no circle, which would wait for Python to look for garbage."""
    block = double()
    y = TiledBlock(block, tile=8)(leaf())
    y.grad_fn.held = Held()
    held = weakref.ref(y.grad_fn.held)
    gc.collect()
    gc.disable()
    try:
        del y
        assert held() is None
    finally:
        gc.enable()
