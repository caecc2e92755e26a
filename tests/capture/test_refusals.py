"""What cannot be executed by tiles is refused by name, before anything runs."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memo_runtime.blocks.call import BlockCall
from memo_runtime.capture.captured import capture
from memo_runtime.capture.key import capture_key
from memo_runtime.errors import CaptureRefusedError
from tests.capture import blocks
from tests.exactness import hand_written

REFUSED = {
    blocks.StraightThrough: ("autograd.Function 'Round'", "backward"),
    blocks.TensorHook: ("Tensor.register_hook", "hook"),
    blocks.WritesInput: ("aten.mul_", "writes to an argument"),
    blocks.Counts: ("aten.add_", "buffer"),
    blocks.CountsInPython: ("attribute 'calls'", "changes when the block runs"),
    blocks.AppendsALoss: ("global 'LOSSES' of tests.capture.blocks", "changes when the block runs"),
    blocks.DropsByPython: ("the state of a random generator of Python or NumPy", "changes when the block runs"),
    blocks.StoresALoss: ("attribute 'merge.loss'", "changes when the block runs"),
    hand_written.Spectrum: ("aten.fft_fft", "not known"),
    blocks.AttributeScale: ("aten.mul.Tensor", "neither a parameter nor a buffer"),
    blocks.ByLength: ("aten.div", "number of tokens"),
    blocks.WithoutGradient: ("aten.abs", "without gradients"),
    blocks.Frequencies: ("aten.embedding", "whole batch"),
    blocks.Repeated: ("aten.repeat_interleave", "not understood"),
    blocks.Noise: ("aten.randn_like", "random"),
    blocks.NormOverTokens: ("aten.instance_norm", "not known"),
    blocks.MixesItself: ("aten.matmul", "keys or values too"),
    blocks.Shifted: ("aten.slice", "part of the tokens"),
    hand_written.CumulativeSum: ("aten.cumsum", "along the token dimension"),
    hand_written.Squeeze: ("aten.mean", "over the token dimension"),
    hand_written.TupleOutput: ("aten.mean", "all elements"),
    hand_written.Convolution: ("aten.conv1d", "not known"),
    hand_written.CustomFunction: ("autograd.Function 'Doubling'", "backward"),
    blocks.GivesBack: ("output", "made in it"),
    hand_written.Routed: ("aten.nonzero.default", "depends on data"),
}


def call_of(tokens: int = 29) -> BlockCall:
    return BlockCall.of((torch.randn(3, tokens, hand_written.WIDTH, requires_grad=True),), {})


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_refused_by_name(kind):
    operator, reason = REFUSED[kind]
    with pytest.raises(CaptureRefusedError) as caught:
        capture(kind(), call_of())
    assert caught.value.operator == operator
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("kind", "mask", "operator", "reason"),
    [
        (blocks.MaskFromTokens, None, "aten.scaled_dot_product_attention", "every query meets every token"),
        (blocks.MaskTimesTokens, "boolean", "aten.mul", "two token dimensions"),
        (blocks.MaskTimesTokens, "additive", "aten.mul", "two token dimensions"),
    ],
)
def test_a_mask_that_cannot_be_tiled(kind, mask, operator, reason):
    shape = (3, 1, 29, 29)
    masks = {"boolean": torch.ones(shape, dtype=torch.bool), "additive": torch.zeros(shape).requires_grad_()}
    given = [masks[mask]] if mask else []
    with pytest.raises(CaptureRefusedError) as caught:
        capture(kind(), BlockCall.of((*call_of().leaves, *given), {}))
    assert caught.value.operator == operator
    assert reason in caught.value.reason


@pytest.mark.parametrize("where", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_a_hook_of_an_inner_module_is_refused_and_one_of_the_block_is_not(where):
    block = hand_written.Attention()
    getattr(block, where)(lambda *_: None)
    capture(block, call_of())
    getattr(block.merge, where)(lambda *_: None)
    with pytest.raises(CaptureRefusedError, match="of 'merge'"):
        capture(block, call_of())


def test_a_hook_of_all_modules_is_refused_also_where_it_comes_later_and_one_of_pytorch_is_not():
    block = hand_written.Attention()
    before = capture_key(block, call_of())
    with FlopCounterMode(display=False):  # which hooks every module, to know their names
        assert capture_key(block, call_of()) == before
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: 2 * out)
    try:
        assert capture_key(block, call_of()) != before
        with pytest.raises(CaptureRefusedError, match=r"lambda.* of all modules: it would not run"):
            capture(block, call_of())
    finally:
        handle.remove()
    assert capture_key(block, call_of()) == before


def test_a_forward_on_an_instance_is_refused():
    block = hand_written.Attention()
    block.merge.forward = lambda x: x
    with pytest.raises(CaptureRefusedError, match="forward of 'merge': it was replaced"):
        capture(block, call_of())


def test_an_attribute_that_cannot_be_copied_is_named():
    block = blocks.AttributeScale()
    block.scale = 2 * torch.ones(hand_written.WIDTH, requires_grad=True)
    with pytest.raises(CaptureRefusedError, match="cannot be copied: 'scale' of its AttributeScale: Runtime"):
        capture(block, call_of())


def test_the_live_module_is_neither_run_nor_changed():
    block = hand_written.Attention()
    before = {name: (id(one), one._version, one.grad) for name, one in block.named_parameters()}
    attributes = {key: id(value) for key, value in block.__dict__.items()}
    block.forward = pytest.fail
    del block.forward
    capture(block, call_of())
    assert {name: (id(one), one._version, one.grad) for name, one in block.named_parameters()} == before
    assert {key: id(value) for key, value in block.__dict__.items()} == attributes


def test_a_block_for_one_length_is_refused_by_what_asked():
    with pytest.raises(CaptureRefusedError, match=r"one number of tokens only: Eq\(.*, 29\) was asked by .*blocks\.py"):
        capture(blocks.OneLength(), call_of())


def test_one_token_is_refused():
    with pytest.raises(CaptureRefusedError, match="1 token is not enough"):
        capture(hand_written.Attention(), call_of(1))


def test_a_call_without_hidden_states_is_refused():
    with pytest.raises(CaptureRefusedError, match="none is a floating-point tensor"):
        capture(hand_written.Attention(), BlockCall.of((torch.zeros(3, 4, dtype=torch.long),), {}))
