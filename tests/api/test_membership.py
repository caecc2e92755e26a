"""Blocks that come to a stack behind wrap, or leave it: nothing manages them, and that is said."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.errors import BlockFallbackError
from tests.exactness.hand_written import WIDTH, Attention


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention() for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def step(model):
    model(torch.randn(2, 12, WIDTH)).sum().backward()


def notes(model):
    return [note for note in memo.report(model).notes if "since wrap" in note or "after wrap" in note]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Stack()


def test_blocks_that_are_added_are_named(model):
    memo.wrap(model, policy="swap")
    step(model)
    assert not notes(model)
    for _ in range(6):
        model.layers.append(copy.deepcopy(model.layers[0]))
    step(model)
    (note,) = notes(model)
    assert "not managed (layers.3, layers.4, layers.5, layers.6 and 2 more)" in note
    assert "memo.unwrap(model)" in note
    step(model)
    assert len(notes(model)) == 1
    memo.unwrap(model)
    memo.wrap(model, policy="swap")
    step(model)
    assert not notes(model)
    assert len(memo.report(model).blocks) == 9


def test_blocks_that_are_replaced_are_named(model):
    memo.wrap(model, policy="swap")
    step(model)
    for index in range(3):
        model.layers[index] = copy.deepcopy(model.layers[index])
    step(model)
    (note,) = notes(model)
    assert "(layers.0, layers.1, layers.2), and 3 of 3 managed ones have left" in note


def test_blocks_that_are_taken_out_are_counted(model):
    memo.wrap(model, policy="swap")
    step(model)
    del model.layers[1]
    step(model)
    (note,) = notes(model)
    assert note.startswith("1 of 3 managed blocks have left since wrap")


@pytest.mark.parametrize("strict", [False, True])
def test_a_list_that_is_another_is_looked_into(model, strict):
    memo.wrap(model, policy="swap", strict=strict)
    step(model)
    model.layers = nn.ModuleList([*model.layers, copy.deepcopy(model.layers[0])])
    if strict:
        with pytest.raises(BlockFallbackError, match=r"not managed \(layers.3\)"):
            step(model)
    else:
        step(model)
        assert "not managed (layers.3)" in notes(model)[0]
    model.layers = nn.ModuleList([*model.layers][:3])
    step(model)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_blocks_inside_something_else_are_there_still(model):
    memo.wrap(model, policy="swap", strict=True, keep_last=0)
    step(model)
    for index in range(3):
        model.layers[index] = Around(model.layers[index])
    step(model)
    assert not notes(model)
    assert all(block.bytes_to_host for block in memo.report(model).blocks)


def test_strict_stops_there(model):
    memo.wrap(model, policy="swap", strict=True)
    step(model)
    model.layers.append(copy.deepcopy(model.layers[0]))
    with pytest.raises(BlockFallbackError, match=r"not managed \(layers.3\)"):
        step(model)
    del model.layers[3]
    step(model)


def test_what_was_left_out_on_purpose_is_no_stranger(model):
    memo.wrap(model, policy="swap", blocks=["layers.0", "layers.1"])
    step(model)
    model.layers.append(copy.deepcopy(model.layers[2]))
    step(model)
    (note,) = notes(model)
    assert "(layers.3)" in note
