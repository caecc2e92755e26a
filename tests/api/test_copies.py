"""Copies and pickles of a wrapped model are ordinary models that share nothing with it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM

import memo_runtime as memo
from memo_runtime.errors import NotWrappedError
from memo_runtime.execution.block import BlockForward
from tests.api.subjects import (
    acted,
    assert_close,
    assert_nothing_held,
    assert_trains_as,
    llama,
    refused,
    step,
    wrapped_llama,
)
from tests.api.towers import POLICIES, signal, tower
from tests.integrations.models import batch, make


def saved(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}
SUBJECTS = {"tower": (tower, signal()), "llama": (llama, batch(tokens=24))}


def assert_independent(copied: nn.Module, model: nn.Module) -> None:
    """No module, parameter, buffer, hook or forward of ``model`` is in ``copied``."""
    refused(NotWrappedError, memo.report, copied)
    modules = {id(module) for module in model.modules()}
    assert not any(id(module) in modules for module in copied.modules())
    memory = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not any(t.data_ptr() in memory for t in (*copied.parameters(), *copied.buffers()))
    for module in copied.modules():
        assert "__getstate__" not in vars(module)
        assert not isinstance(vars(module).get("forward"), BlockForward)
        assert not module._forward_pre_hooks
        assert not module._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_copy_is_unwrapped_and_trains_alone(name: str, how: str, steps: int) -> None:
    made, inputs = SUBJECTS[name]
    model, plain = memo.wrap(made(), **POLICIES["memo"]), made()
    for _ in range(steps):
        step(model, inputs)
    copied = COPIES[how](model)
    assert type(copied) is type(model)
    assert_independent(copied, model)
    assert [list(vars(m)) for m in copied.modules()] == [list(vars(m)) for m in plain.modules()]
    assert_trains_as(copied, plain, inputs, bound=0)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    del copied
    assert_trains_as(model, plain, inputs)
    acted(model)


def test_a_copy_of_a_wrapped_model_can_be_wrapped_differently() -> None:
    model = memo.wrap(tower(), **POLICIES["swap"])
    step(model, signal())
    copied = memo.wrap(copy.deepcopy(model), **POLICIES["recompute"])
    for _ in range(2):
        assert_close(step(copied, signal()), step(model, signal()))
    assert acted(model).totals.recomputed_flops == 0
    assert acted(copied).totals.recomputed_flops > 0


def test_a_copy_made_between_forward_and_backward() -> None:
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    step(model, signal())
    loss = model(signal()).square().mean()
    copied = copy.deepcopy(model)
    loss.backward()
    assert_independent(copied, model)
    assert_trains_as(copied, plain, signal(), bound=0)
    del loss
    assert_nothing_held(model)


def test_a_copy_of_one_block_is_an_ordinary_block() -> None:
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    step(model, signal())
    copied = copy.deepcopy(model.layers[1])
    assert not isinstance(vars(copied).get("forward"), BlockForward)
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    results = []
    for block in (copied, plain.layers[1]):
        block(x).square().mean().backward()
        results.append([p.grad for p in block.parameters()])
        block.zero_grad()
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert_trains_as(model, plain, signal())


def test_an_ema_copy_follows_the_wrapped_model() -> None:
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)) for m in (model, plain)]
    refused(NotWrappedError, memo.report, averages[0])
    for seed in range(3):
        for m, average in zip((model, plain), averages, strict=True):
            m(signal(seed=seed)).square().mean().backward()
            torch.optim.SGD(m.parameters(), lr=0.1).step()
            m.zero_grad()
            average.update_parameters(m)
    with torch.no_grad():
        got, want = (average(signal()) for average in averages)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    acted(model)


def test_a_state_dict_goes_both_ways() -> None:
    model = memo.wrap(tower(), **POLICIES["recompute"])
    step(model, signal())
    other = tower()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    model.load_state_dict(other.state_dict())
    assert_trains_as(model, other, signal())
    fresh = tower()
    fresh.load_state_dict(model.state_dict())
    assert_trains_as(fresh, other, signal(), bound=0)


@pytest.mark.parametrize("steps", [0, 1])
def test_save_pretrained_writes_an_ordinary_checkpoint(steps: int, tmp_path: Path) -> None:
    model = wrapped_llama()
    for _ in range(steps):
        step(model)
    model.save_pretrained(tmp_path / "wrapped")
    make("llama").save_pretrained(tmp_path / "plain")
    names = [sorted(path.name for path in (tmp_path / how).iterdir()) for how in ("wrapped", "plain")]
    assert names[0] == names[1]
    assert len({(tmp_path / how / "config.json").read_text() for how in ("wrapped", "plain")}) == 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "wrapped")
    refused(NotWrappedError, memo.report, loaded)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    memo.wrap(loaded.train(), **POLICIES["swap"])
    assert_close(step(loaded), step(model))
    acted(loaded)
