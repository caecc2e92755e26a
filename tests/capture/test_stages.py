"""How captured blocks are cut, and when a capture holds."""

import copy
import importlib
from collections import deque

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from memo_runtime.blocks.call import BlockCall
from memo_runtime.capture.axes import NotTokenWiseError, TokenSymbol, at, reshaped
from memo_runtime.capture.captured import capture
from memo_runtime.capture.key import Itself, capture_key
from memo_runtime.capture.rules import operator_name
from memo_runtime.capture.split import Mixer, Segment
from tests.capture import blocks
from tests.exactness import hand_written
from tests.exactness.hand_written import WIDTH


def call_of(tokens=29, rows=3, **others):
    return BlockCall.of((torch.randn(rows, tokens, WIDTH, requires_grad=True),), others)


def names(stage):
    return [operator_name(node) for node in stage.nodes]


def test_a_block_is_cut_at_its_mixer():
    found = capture(hand_written.Attention(), call_of())
    first, mixer, last = found.stages.stages
    assert isinstance(first, Segment)
    assert isinstance(mixer, Mixer)
    assert [operator_name(node) for node in mixer.inputs] == ["aten.transpose"] * 3
    # The MLP is made where it is used, and nothing of the first segment is made again: the residual is the input.
    assert names(first).count("aten.linear") == 1
    assert names(last).count("aten.linear") == 3
    assert {node.op for node in last.sources} == {"placeholder", "call_function"}
    assert mixer.node in last.sources


def test_no_kernel_of_attention_is_asked_while_a_block_is_traced(monkeypatch):
    """Which kernel serves a size is a condition on it; on CUDA some of them held for one length only."""
    trace = importlib.import_module("memo_runtime.capture.trace")
    monkeypatch.setattr(trace, "_look", lambda *_, **__: None)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):  # which no CPU has: attention would raise
        found = capture(hand_written.Attention(), call_of())
    assert isinstance(found.stages.stages[1], Mixer)
    assert found.traced.guards == ()


def test_a_value_that_crosses_a_cut_is_made_again_in_the_segment_that_uses_it():
    found = capture(hand_written.TwoMixers(), call_of())
    kinds = [type(stage) for stage in found.stages.stages]
    assert kinds == [Segment, Mixer, Segment, Mixer, Segment]
    second = found.stages.stages[2]
    assert names(second).count("aten.linear") == 1  # keys and values of the second attention
    assert len(second.outputs) == 2  # its queries are at hand


def test_attention_that_is_written_out_goes_by_rows():
    found = capture(hand_written.EagerAttention(), call_of())
    rows = found.stages.stages[1]
    assert rows.by_rows
    assert "aten.softmax" in names(rows)
    # Queries in tiles along dimension 2, keys and values whole, the mask and the dropout in rows.
    cut = sorted(axis.dim for node, axis in rows.axes.items() if axis is not None and node in rows.sources)
    assert set(cut) <= {0, 1, 2}
    assert sum(rows.axes[node] is None for node in rows.sources) == 2


def test_what_is_made_from_parameters_is_made_once():
    found = capture(hand_written.Normalised(), call_of())
    assert [operator_name(node) for node in found.stages.weights] == ["aten._weight_norm"]
    found = capture(blocks.LearnedBias(), call_of())
    assert "aten.embedding" in {operator_name(node) for node in found.stages.weights}


def test_positions_are_made_once_at_full_length():
    found = capture(hand_written.OwnPositions(), call_of())
    assert "aten.arange" in {operator_name(node) for node in found.stages.fixed}
    assert all("arange" not in name for segment in found.segments for name in names(segment))


def test_parameters_are_read_at_each_call():
    block = hand_written.Attention()
    found = capture(block, call_of())
    other = copy.deepcopy(block)
    assert [id(one) for one in found.read_states(other)] == [id(other.get_parameter(name)) for _, name in found.states]


def test_a_condition_on_the_length_is_kept():
    found = capture(hand_written.OnlyMultiples(), call_of(24))
    assert found.traced.allows(40)
    assert not found.traced.allows(41)
    found = capture(blocks.AnotherWay(), call_of(20))
    assert found.traced.allows(23)
    assert not found.traced.allows(24)


def test_a_length_that_is_also_another_size():
    """32 tokens of width 32, in 4 heads of 8."""
    found = capture(hand_written.Attention(), call_of(WIDTH))
    assert found.mixers == 1
    assert found.traced.allows(WIDTH)


def test_blocks_alike_share_programs_and_others_do_not():
    one, two = hand_written.Attention(), hand_written.Attention()
    assert capture(one, call_of()).signature == capture(two, call_of(31)).signature
    two.up.weight.requires_grad_(False)
    assert capture(one, call_of()).signature != capture(two, call_of()).signature
    assert capture(one, call_of(rows=2)).signature != capture(one, call_of()).signature


CHANGES = {
    "training flag of an inner module": lambda block: block.norm.eval(),
    "attribute in a list in a dict": lambda block: block.settings["scales"].append(2.0),
    "plain attribute": lambda block: setattr(block, "other", 3),
    "requires_grad": lambda block: block.up.weight.requires_grad_(False),
    "dtype": lambda block: block.double(),
    "a module exchanged": lambda block: setattr(block, "merge", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_block_captures_again(change):
    block, call = blocks.Switched(), call_of()
    before = capture_key(block, call)
    assert capture_key(block, call_of(40)) == before
    hash(before)
    change(block)
    assert capture_key(block, call) != before


def test_another_kind_of_call_captures_again():
    block, call = blocks.Switched(), call_of()
    before = capture_key(block, call)
    assert capture_key(block, call_of(extra=None)) != before
    assert capture_key(block, call_of(extra=torch.zeros(3, 29, WIDTH))) != before
    assert capture_key(block, call_of(rows=2)) != before
    assert capture_key(block, BlockCall.of((torch.randn(3, 29, WIDTH),), {})) != before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert capture_key(block, call) != before


def test_a_change_of_a_configuration_object_captures_again():
    class Config:
        attention = "sdpa"

    block = blocks.Switched()
    block.config = Config()
    block.config.attention = "sdpa"
    before = capture_key(block, call_of())
    block.config.attention = "eager"
    assert capture_key(block, call_of()) != before


class Holder:
    """An object that somebody wrote."""

    def __init__(self, value):
        self.value = value


class Scale(Holder):
    """One that is called."""

    def __call__(self, x):
        return self.value * x


class Slot:
    """One without a dictionary."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def test_every_object_is_looked_into_wherever_it_is():
    """Also behind others, inside others, and where it was met before at the end of a long way."""
    block = blocks.Switched()
    last = Holder(1)
    block.long, block.first, block.second = [[[[last]]]], Holder(1), Holder(1)
    block.nested, block.many = Holder(Holder(Holder(1))), [Holder(1), {"one": Holder(1), "two": Holder(1)}]
    block.last, block.scale, block.slot, block.queue = last, Scale(1), Slot(1), deque([Holder(1)])
    objects = [block.first, block.second, block.nested.value.value, block.many[0], block.many[1]["two"], last]
    objects += [block.scale, block.slot, block.queue[0]]
    for number, one in enumerate(objects):
        before = capture_key(block, call_of())
        one.value = 2
        assert capture_key(block, call_of()) != before, number


def test_an_object_with_the_address_of_one_that_has_gone_is_another():
    one, other = Holder(1), Holder(1)
    gone, there = Itself(one), Itself(other)
    assert gone == Itself(one)
    assert gone != there
    there._address = gone._address
    del one
    assert gone != there


def symbol():
    import sympy

    return TokenSymbol(sympy.Symbol("s0"))


class Size:
    """A size that stands for n times the tokens."""

    def __init__(self, token, factor):
        self.node = type("Node", (), {"expr": token.symbol * factor})()


def test_tokens_are_followed_through_reshapes():
    token = symbol()
    s, s3 = Size(token, 1), Size(token, 3)
    assert reshaped((3, s, 32), at(1), (s3, 32), token) == at(0, 3, 1)
    assert reshaped((s3, 32), at(0, 3, 1), (3, s, 4, 8), token) == at(1)
    assert reshaped((s, 3, 32), at(0), (s3, 32), token) == at(0, 1, 3)
    # Batch and tokens swapped: the same sizes, other elements.
    with pytest.raises(NotTokenWiseError):
        reshaped((3, s, 32), at(1), (s, 3, 32), token)
