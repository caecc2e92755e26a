"""Ctrl-C anywhere in a step whose blocks make their inputs again: nothing is lost or held, and training goes on."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest

import memo_runtime as memo
from memo_runtime.records import Plan
from tests.api.interrupting import Interrupter, every_place
from tests.api.subjects import assert_close, assert_nothing_held, loss_of, step
from tests.api.test_interrupted_anywhere import FILES, again, ambient, assert_given_up, let_go
from tests.api.towers import signal, tower
from tests.exactness.chains import with_runs


def plan() -> Plan:
    """With less host memory than two steps take."""
    profile = memo.profile(tower(3), signal(), tiles=True)
    found = with_runs(memo.plan(profile, policy="tiled", alpha=0.5, keep_last=0, tile=8), 4)
    assert [block.from_below for block in found.blocks] == [False, True, True]
    return replace(found, limits=replace(found.limits, host_bytes=found.forecast.host_bytes * 5 // 4))


@pytest.mark.slow
def test_a_step_goes_on_after_a_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = memo.wrap(tower(3), plan=plan()), tower(3)
    want = step(plain, signal(seed=5))
    lost: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: lost.append(what.object))
    for _ in range(2):
        step(model, signal())
    before = ambient()
    for at in every_place(FILES, lambda: step(model, signal()))[::29]:
        interrupter = Interrupter(FILES, at)
        assert interrupter.run(lambda: step(model, signal())), f"lost at {interrupter.where}"
        assert not lost, interrupter.where
        assert ambient() == before, interrupter.where
        let_go(model)
        assert_close(step(model, signal(seed=5)), want)
    assert_nothing_held(model)


@pytest.mark.slow
def test_a_graph_that_was_retained_goes_backward_after_a_ctrl_c() -> None:
    model, plain = memo.wrap(tower(3), plan=plan()), tower(3)
    want = again(plain, loss_of(plain, signal()))
    step(model, signal())

    def backward(at: int = 0) -> Interrupter:
        loss = loss_of(model, signal())
        interrupter = Interrupter(FILES, at)
        interrupter.run(lambda: loss.backward(retain_graph=True))
        assert_close(again(model, loss), want)
        return interrupter

    watch = backward()
    for at in sorted(times[len(times) // 2] for times in watch.seen.values())[::9]:
        backward(at)
    let_go(model)


@pytest.mark.slow
def test_host_memory_of_a_step_that_was_given_up_is_taken_back() -> None:
    """Somebody keeps its graph: its blocks, and those that would be made of them, go backward no more."""
    planned = plan()
    model, plain = memo.wrap(tower(3), plan=planned), tower(3)
    for _ in range(2):
        step(model, signal())
    kept = [model.layers[1](model.layers[0](model.first(signal())))]
    handle = model.layers[2].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.layers[2](kept[0])
    handle.remove()
    assert_given_up(model, plain, kept)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
