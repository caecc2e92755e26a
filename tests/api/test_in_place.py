"""``wrap`` works in place, twice is once, and ``unwrap`` leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.errors import AlreadyWrappedError, NotWrappedError
from tests.api.subjects import acted, assert_nothing_held, assert_trains_as, llama, refused, step
from tests.api.towers import POLICIES, signal, tower
from tests.integrations.models import batch, make

SUBJECTS = {"tower": (tower, signal()), "llama": (llama, batch(tokens=24))}


def state_of(model: nn.Module) -> list[tuple[list[str], dict[str, list[Any]]]]:
    """Keys of every module's ``__dict__``, in order, and what its hook tables hold."""
    return [
        (
            list(vars(module)),
            {name: list(table) for name, table in vars(module).items() if name.endswith(("hooks", "kwargs"))},
        )
        for module in model.modules()
    ]


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_model_stays_what_it_is(name: str) -> None:
    made, inputs = SUBJECTS[name]
    model, plain = made(), made()
    classes = [type(module) for module in model.modules()]
    modules = list(model.named_modules())
    parameters = list(model.named_parameters())
    assert memo.wrap(model, **POLICIES["memo"]) is model
    for _ in range(2):
        assert_trains_as(model, plain, inputs)
        assert [type(module) for module in model.modules()] == classes
        assert list(model.named_modules()) == modules
        now = list(model.named_parameters())
        assert [n for n, _ in now] == [n for n, _ in parameters]
        assert all(a is b for (_, a), (_, b) in zip(now, parameters, strict=True))
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [n for n, _ in model.named_buffers()] == [n for n, _ in plain.named_buffers()]
    acted(model)


def test_an_optimizer_made_before_trains_the_wrapped_model() -> None:
    model, plain = tower(), tower()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain)]
    memo.wrap(model, optimizer=optimizers[0], **POLICIES["recompute"])
    for seed in range(4):
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            m(signal(seed=seed)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert memo.report(model).states.optimizer_name == "AdamW"
    assert not memo.report(model).states.assumed


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", SUBJECTS)
def test_unwrap_leaves_every_dict_as_it_was(name: str, steps: int) -> None:
    made, inputs = SUBJECTS[name]
    model, plain = made(), made()
    before = state_of(model)
    for settings in (POLICIES["swap"], POLICIES["memo"]):
        memo.wrap(model, **settings)
        assert state_of(model) != before
        for _ in range(steps):
            step(model, inputs)
        assert memo.unwrap(model) is model
        assert state_of(model) == before
    assert_trains_as(model, plain, inputs)


def test_unwrap_of_a_causal_lm_puts_its_loss_and_head_back() -> None:
    model = make("llama")
    before, loss = state_of(model), model.loss_function
    memo.wrap(model)
    assert model.loss_function is not loss
    step(model)
    memo.unwrap(model)
    assert state_of(model) == before
    assert model.loss_function is loss


def test_a_forward_and_hooks_of_the_users_own_come_back() -> None:
    model, plain = tower(), tower()
    calls: list[str] = []
    own: dict[nn.Module, Any] = {}
    for module in model.layers:
        inner = module.forward

        def forward(x: torch.Tensor, inner: Any = inner) -> torch.Tensor:
            calls.append("own")
            return inner(x)

        module.forward = own[module] = forward
    handle = model.register_forward_pre_hook(lambda module, args: calls.append("hook"))
    memo.wrap(model, **POLICIES["swap"])
    assert_trains_as(model, plain, signal())
    assert "own" in calls
    memo.unwrap(model)
    assert all(module.forward is forward for module, forward in own.items())
    calls.clear()
    assert_trains_as(model, plain, signal())
    assert calls == ["hook", "own", "own", "own"]
    handle.remove()
    assert not model._forward_pre_hooks


def test_unwrap_of_an_unwrapped_model_does_nothing() -> None:
    model = tower()
    before = state_of(model)
    assert memo.unwrap(model) is model
    assert memo.unwrap(memo.unwrap(memo.wrap(model))) is model
    assert state_of(model) == before


def test_a_graph_that_is_alive_at_unwrap_still_goes_backward() -> None:
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    step(model, signal())
    loss, want = model(signal()).square().mean(), plain(signal()).square().mean()
    memo.unwrap(model)
    loss.backward()
    want.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15)


# Twice is once.


def test_the_same_settings_again_change_nothing() -> None:
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    for _ in range(2):
        step(model, signal())
        state, report = state_of(model), memo.report(model)
        assert memo.wrap(model, **POLICIES["memo"]) is model
        assert memo.wrap(model, policy="memo", alpha=0.37, keep_last=0, budget=None) is model
        assert state_of(model) == state
        assert memo.report(model) == report
    assert_trains_as(model, plain, signal())


OTHERS: dict[str, dict[str, Any]] = {
    "policy": {"policy": "swap", "keep_last": 0},
    "alpha": {"policy": "memo", "alpha": 0.5, "keep_last": 0},
    "keep_last": {"policy": "memo", "alpha": 0.37},
    "budget": {"policy": "memo", "alpha": 0.37, "keep_last": 0, "host_budget": "1GiB"},
    "blocks": {"policy": "memo", "alpha": 0.37, "keep_last": 0, "blocks": ["layers.0", "layers.1"]},
    "loss": {"policy": "memo", "alpha": 0.37, "keep_last": 0, "loss": "native"},
}


@pytest.mark.parametrize("difference", OTHERS)
def test_other_settings_are_refused_and_the_first_stay(difference: str) -> None:
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    message = refused(AlreadyWrappedError, memo.wrap, model, **OTHERS[difference])
    assert "policy 'memo'" in message
    assert "alpha=0.37" in message
    assert "memo.unwrap(model)" in message
    assert_trains_as(model, plain, signal())
    assert {block.alpha for block in acted(model).blocks} == {8 / 24}
    memo.wrap(memo.unwrap(model), **OTHERS[difference])
    assert_trains_as(model, plain, signal())


@pytest.mark.parametrize("first", ["outer", "inner"])
def test_a_model_inside_a_wrapped_one_is_wrapped_already(first: str) -> None:
    model, plain = llama(), llama()
    inside, outside = (model, model.model) if first == "outer" else (model.model, model)
    memo.wrap(inside, **POLICIES["swap"])
    message = refused(AlreadyWrappedError, memo.wrap, outside, **POLICIES["recompute"])
    assert "policy 'swap'" in message
    assert "unwrap" in message
    assert_trains_as(model, plain)
    assert memo.report(inside).policy == "swap"
    assert acted(inside).totals.recomputed_flops == 0
    memo.unwrap(inside)
    memo.wrap(outside, **POLICIES["recompute"])
    assert_trains_as(model, plain)
    assert acted(outside).totals.recomputed_flops > 0


# Reports.


def test_a_report_before_the_first_step_is_empty() -> None:
    model = memo.wrap(tower(), **POLICIES["swap"])
    report = memo.report(model)
    assert report.policy == "swap"
    assert (report.blocks, report.totals.steps, report.totals.host_bytes) == ((), 0, 0)
    assert str(report)
    assert_trains_as(model, tower(), signal())
    assert memo.report(model).totals.steps == 1
    assert_nothing_held(model)


def test_a_report_of_an_unwrapped_model_says_what_to_call() -> None:
    model = tower()
    assert "memo.wrap(model)" in refused(NotWrappedError, memo.report, model)
    memo.unwrap(memo.wrap(model))
    assert "Tower is not wrapped" in refused(NotWrappedError, memo.report, model)
    assert_trains_as(model, tower(), signal())


def test_policy_none_runs_the_model_as_it_is() -> None:
    model, plain = memo.wrap(tower(), policy="none"), tower()
    got, want = step(model, signal()), step(plain, signal())
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert memo.report(model).totals.bytes_to_host == 0
    memo.unwrap(model)
