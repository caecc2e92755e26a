"""What is in the way of tiles for a while costs the steps in which it is there, and no others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.errors import BlockFallbackError
from memo_runtime.records import Executor
from tests.integrations.models import make

IDS = torch.randint(0, 97, (2, 64), generator=torch.Generator().manual_seed(5))


def step(model: nn.Module, **more: Any) -> set[Executor]:
    """Train once; the executors of its blocks, none of which are known of a model that is not wrapped."""
    model.zero_grad()
    output = model(input_ids=IDS, labels=IDS, **more)
    recorded = output.attentions or ()
    (output.loss + sum(one.square().mean() for one in recorded)).backward()
    wrapped = hasattr(model, "_memo")
    return {block.executor for block in memo.report(model).blocks} if wrapped else set()


def pair(**settings: Any) -> tuple[nn.Module, nn.Module]:
    plain = make("llama", attn_implementation="eager")
    model = copy.deepcopy(plain)
    memo.wrap(model, policy="tiled", tile=16, **settings)
    return plain, model


def same(plain: nn.Module, model: nn.Module) -> bool:
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    return all(torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-12) for one, other in pairs)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("strict", [False, True])
def test_an_evaluation_that_records_outputs_leaves_tiles_as_they_were(asked: str, strict: bool) -> None:
    plain, model = pair(strict=strict)
    assert step(model) == {Executor.TILED}
    for one in (plain, model):
        with torch.no_grad():
            one.eval()(input_ids=IDS, **{asked: True})
            one.train()
    assert step(model) == {Executor.TILED}
    step(plain)
    assert same(plain, model)
    assert not any("hook" in note for note in memo.report(model).notes)


def test_outputs_recorded_in_a_step_are_those_of_the_block() -> None:
    plain, model = pair()
    step(model)
    step(plain, output_attentions=True)
    assert Executor.TILED not in step(model, output_attentions=True)
    assert same(plain, model)
    assert step(model) == {Executor.TILED}
    step(plain)
    assert same(plain, model)


def test_hidden_states_are_recorded_beside_tiles() -> None:
    """Their hooks are on the blocks themselves, which tiles do not enter."""
    plain, model = pair()
    for _ in range(2):
        step(plain, output_hidden_states=True)
        assert step(model, output_hidden_states=True) == {Executor.TILED}
    assert same(plain, model)


def test_a_hook_that_has_gone_is_in_the_way_no_more() -> None:
    plain, model = pair()
    step(model)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert step(model) == {Executor.TILED, Executor.NATIVE}
    assert step(model) == {Executor.TILED, Executor.REPLAY}
    handle.remove()
    assert step(model) == {Executor.TILED}
    step(plain)
    assert same(plain, model)


def test_one_that_comes_and_goes_is_not_followed_for_ever() -> None:
    _, model = pair()
    step(model)
    natives = 0
    for _ in range(7):
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
        natives += Executor.NATIVE in step(model)
        handle.remove()
        step(model)
    assert natives == 4
    assert step(model) == {Executor.TILED, Executor.REPLAY}


def test_strict_refuses_the_step_with_the_hook_alone() -> None:
    _, model = pair(strict=True)
    step(model)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(BlockFallbackError, match="hook"):
        step(model)
    handle.remove()
    assert step(model) == {Executor.TILED}


def test_blocks_that_are_compiled_later_stay_with_tiles() -> None:
    plain, model = pair()
    step(model)
    for layer in model.model.layers:
        layer.compile(backend="eager")
        layer.mlp.compile(backend="eager")
    assert step(model) == {Executor.TILED}
    step(plain)
    assert same(plain, model)
