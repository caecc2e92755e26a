"""What a step takes it gives back: after many steps, after steps that are abandoned, after the model is dropped."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.reports import Totals
from tests.api.main_ways import MAIN_POLICIES
from tests.api.subjects import acted, assert_nothing_held, assert_trains_as, llama, step, totals
from tests.api.towers import POLICIES, signal, tower
from tests.integrations.models import batch

SUBJECTS: dict[str, Any] = {"tower": (tower, signal()), "llama": (llama, batch(tokens=24))}


def held(of: Totals) -> tuple[int, ...]:
    """Everything that may grow from step to step."""
    return (
        of.host_bytes,
        of.host_bytes_in_use,
        of.stash_bytes,
        of.open_copies,
        of.peak_bytes,
        of.bytes_to_host,
        of.bytes_to_device,
        of.bytes_kept,
    )


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


@pytest.mark.parametrize("steps", [60, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", MAIN_POLICIES)
def test_many_steps_are_as_the_second(policy: str, steps: int) -> None:
    model = memo.wrap(tower(2), **POLICIES[policy])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    reports, tensors, objects = [], [], []
    for number in range(1, steps + 1):
        model(signal(tokens=17, seed=number)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        reports.append(totals(model))
        if number in (2, steps):
            tensors.append(live_tensors())
            objects.append(len(gc.get_objects()))
    assert {held(report) for report in reports[1:]} == {held(reports[1])}
    assert reports[-1].host_bytes == reports[-1].forecast.host_bytes
    assert reports[-1].steps == steps
    assert tensors[0] == tensors[1]
    assert objects[1] - objects[0] < 5 * steps
    assert_nothing_held(model)


def test_steps_of_changing_lengths_hold_what_the_largest_one_needs() -> None:
    """Pinning host memory anew for every length would take longer than the step."""
    model = memo.wrap(tower(2), **POLICIES["memo"])
    most = 0
    for number in range(60):
        step(model, signal(tokens=(17, 40, 24)[number % 3]))
        most = max(most, totals(model).forecast.host_bytes)
        assert totals(model).host_bytes == most
        assert totals(model).peak_bytes == totals(model).forecast.peak_bytes
        assert totals(model).host_bytes_in_use == totals(model).stash_bytes == 0


@pytest.mark.parametrize("keep_last", [0, 1])
@pytest.mark.parametrize("policy", MAIN_POLICIES)
@pytest.mark.parametrize("name", SUBJECTS)
def test_the_forecast_of_the_first_step_is_the_steady_peak(name: str, policy: str, keep_last: int) -> None:
    made, inputs = SUBJECTS[name]
    model, plain = memo.wrap(made(), **(POLICIES[policy] | {"keep_last": keep_last})), made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for _ in range(4):
        assert_trains_as(model, plain, inputs)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        report = acted(model).totals
        assert report.peak_bytes == report.forecast.peak_bytes
        assert report.stash_peak_bytes == report.forecast.stash_peak_bytes
        assert report.bytes_kept == report.forecast.bytes_kept
        assert report.host_bytes == report.forecast.host_bytes
    for block, planned in zip(memo.report(model).blocks, memo.report(model).blocks, strict=True):
        assert block == planned


# Abandoned steps.


@pytest.mark.parametrize("keep_last", [0, 2])
@pytest.mark.parametrize("policy", MAIN_POLICIES)
def test_forwards_without_a_backward_give_everything_back(policy: str, keep_last: int) -> None:
    model, plain = memo.wrap(tower(), **(POLICIES[policy] | {"keep_last": keep_last})), tower()
    for _ in range(3):
        model(signal())
        assert_nothing_held(model)
    loss = model(signal()).square().mean()
    assert totals(model).host_bytes_in_use > 0
    del loss
    assert_nothing_held(model)
    for _ in range(2):
        assert_trains_as(model, plain, signal())
        assert acted(model).totals.peak_bytes == totals(model).forecast.peak_bytes
    assert totals(model).host_bytes == totals(model).forecast.host_bytes


def test_a_loss_that_is_kept_after_its_backward_holds_nothing() -> None:
    model = memo.wrap(tower(), **POLICIES["memo"])
    losses = []
    for seed in range(5):
        losses.append(model(signal(seed=seed)).square().mean())
        losses[-1].backward()
        assert_nothing_held(model)
    assert totals(model).host_bytes == totals(model).forecast.host_bytes


@pytest.mark.parametrize("policy", MAIN_POLICIES)
def test_a_graph_that_is_retained_is_given_back_when_it_is_dropped(policy: str) -> None:
    model, plain = memo.wrap(tower(), **POLICIES[policy]), tower()
    step(model, signal())
    loss, want = model(signal()).square().mean(), plain(signal()).square().mean()
    for _ in range(2):
        loss.backward(retain_graph=True)
        want.backward(retain_graph=True)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-14)
    assert totals(model).host_bytes_in_use > 0
    del loss
    assert_nothing_held(model)
    assert_trains_as(model, plain, signal())


def test_a_backward_through_a_part_gives_the_rest_back() -> None:
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    step(model, signal())
    middle: dict[nn.Module, torch.Tensor] = {}
    for m in (model, plain):
        m.layers[1].register_forward_hook(lambda module, args, output, m=m: middle.__setitem__(m, output))
    grads = []
    for m in (model, plain):
        loss = m(signal()).square().mean()
        grads.append(torch.autograd.grad(loss, middle[m]))
        del loss
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-14)
    middle.clear()
    assert_nothing_held(model)
    assert_trains_as(model, plain, signal())


# Dropped models.


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_dropped_model_is_collected(name: str, steps: int) -> None:
    made, inputs = SUBJECTS[name]
    model = memo.wrap(made(), **POLICIES["memo"])
    for _ in range(steps):
        step(model, inputs)
    watched = [weakref.ref(item) for item in (model, *model.modules(), *model.parameters())]
    del model
    gc.collect()
    assert [watch() for watch in watched if watch() is not None] == []


def test_a_model_that_is_profiled_or_checked_is_collected() -> None:
    model = tower()
    memo.plan(memo.profile(model, signal()))
    memo.check(model, signal(), **POLICIES["memo"])
    watched = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert [watch() for watch in watched if watch() is not None] == []


def test_an_unwrapped_model_lets_go_of_the_runtime() -> None:
    from memo_runtime.lookup import find_wrapped

    model = memo.wrap(tower(), **POLICIES["memo"])
    step(model, signal())
    wrapped = find_wrapped(model)
    assert wrapped is not None
    session, pool = weakref.ref(wrapped.session), weakref.ref(wrapped.session.tools.pool)
    del wrapped
    memo.unwrap(model)
    gc.collect()
    assert session() is None
    assert pool() is None


@pytest.mark.anew
def test_profiling_leaves_no_tensor_behind() -> None:
    model = tower()
    memo.profile(model, signal())
    before = live_tensors()
    for tokens in (24, 31, 40):
        memo.profile(model, signal(tokens=tokens))
    assert live_tensors() == before
