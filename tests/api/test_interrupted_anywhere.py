"""Ctrl-C wherever Python looks for signals in our code: nothing is lost, nothing stays held, and training goes on."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import memo_runtime as memo
from memo_runtime.blocks.aside import is_aside
from memo_runtime.errors import StepGivenUpError
from tests.api.interrupting import Interrupter, every_place
from tests.api.subjects import Gradients, assert_close, assert_nothing_held, loss_of, step, totals
from tests.api.towers import HIDDEN, POLICIES, Tower, signal, tower

HOW: dict[str, dict[str, Any]] = {**POLICIES, "tiled": {"policy": "tiled", "alpha": 0.5, "keep_last": 0, "tile": 8}}
#: Where memory and copies change hands, and where a rerun takes the place of its forward.
FILES = ("memo_runtime/native/", "memo_runtime/execution/", "memo_runtime/blocks/undo", "memo_runtime/blocks/a",
         "torch/autograd/graph.py", "torch/utils/_python_dispatch.py")  # fmt: skip
#: Of about 800 places in a step, every so many-th.
STRIDES = [pytest.param(101), pytest.param(7, marks=pytest.mark.slow)]


class Counting(nn.Module):
    """Keeps a mean and counts its calls: what a rerun does to them has to be put back."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(HIDDEN, dtype=torch.float64))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * x.mean((0, 1)))
        return x * (1 + 0.001 * (self.calls % 3))

    def state(self) -> tuple[int, Tensor]:
        """Calls and mean."""
        return self.calls, self.mean.clone()


def counting() -> tuple[Tower, Counting]:
    """Two blocks, the second of which has state."""
    model, state = tower(2), Counting()
    model.layers[1].mlp.insert(1, state)
    return model, state


def ambient() -> tuple[object, ...]:
    """What a context manager that was not left would leave behind."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks, len(_get_current_dispatch_mode_stack()), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


def let_go(model: nn.Module) -> None:
    """Nothing of the interrupted step is there any more."""
    model.zero_grad(set_to_none=True)
    assert_nothing_held(model)


def assert_given_up(model: nn.Module, plain: nn.Module, kept: list[Tensor]) -> None:
    """A step whose graph is ``kept`` has host memory until the next one starts, and goes backward no more."""
    assert totals(model).host_bytes_in_use > 0
    want = step(plain, signal(seed=3))
    for _ in range(2):
        assert_close(step(model, signal(seed=3)), want)
    with pytest.raises(StepGivenUpError, match="that an exception ended"):
        kept[0].sum().backward()
    kept.clear()
    gc.collect()
    let_go(model)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("how", HOW)
def test_a_step_goes_on_after_a_ctrl_c(how: str, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = memo.wrap(tower(2), **HOW[how]), tower(2)
    want = step(plain, signal(seed=5))
    lost: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: lost.append(what.object))
    for _ in range(2):
        step(model, signal())
    before = ambient()
    for at in every_place(FILES, lambda: step(model, signal()))[::stride]:
        interrupter = Interrupter(FILES, at)
        assert interrupter.run(lambda: step(model, signal())), f"lost at {interrupter.where}"
        assert not lost, interrupter.where
        assert ambient() == before, interrupter.where
        let_go(model)
        assert_close(step(model, signal(seed=5)), want)
    assert_nothing_held(model)


def again(model: nn.Module, loss: Tensor) -> Gradients:
    """Backward once more."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stride", STRIDES)
def test_a_graph_that_was_retained_goes_backward_after_a_ctrl_c(stride: int) -> None:
    """What was fetched or rebuilt by half is made again, and the model's own state is as after the forward."""
    (model, state), (plain, twin) = counting(), counting()
    memo.wrap(model, **POLICIES["memo"])

    def backward(at: int = 0) -> Interrupter:
        loss = loss_of(model, signal())
        before = state.state()
        interrupter = Interrupter(FILES, at)
        interrupter.run(lambda: loss.backward(retain_graph=True))
        calls, mean = state.state()
        assert calls == before[0], interrupter.where
        assert torch.equal(mean, before[1]), interrupter.where
        got = again(model, loss)
        want = again(plain, loss_of(plain, signal()))
        assert_close(got, want)
        return interrupter

    for _ in range(2):
        backward()
    watch = backward()
    for at in sorted(times[len(times) // 2] for times in watch.seen.values())[::stride]:
        backward(at)
    let_go(model)
    assert twin.calls == state.calls


@pytest.mark.parametrize(
    "file", [pytest.param("contextlib.py", marks=pytest.mark.slow), "memo_runtime/blocks/aside.py"]
)
def test_no_mode_of_a_rerun_comes_back(file: str) -> None:
    """A context manager that is closed late must not put the mode of an interrupted rerun into another step: it would
    replace the attention there by that of the rerun.
    """
    model, plain = memo.wrap(tower(2), **POLICIES["memo"]), tower(2)
    want = step(plain, signal(seed=5))
    for _ in range(2):
        step(model, signal())
    before = ambient()
    watch = Interrupter((file,))
    watch.run(lambda: step(model, signal()))
    for times in watch.seen.values():
        for at in {times[0], times[len(times) // 2], times[-1]}:
            interrupter = Interrupter((file,), at)
            assert interrupter.run(lambda: step(model, signal())), f"lost at {interrupter.where}"
            assert ambient() == before, interrupter.where
            assert not is_aside()
            let_go(model)
    assert_close(step(model, signal(seed=5)), want)


@pytest.mark.parametrize("how", HOW)
def test_a_kept_traceback_does_not_keep_host_memory(how: str) -> None:
    """A notebook keeps the last exception with all its frames, and in them the graph of the interrupted step."""
    needed = memo.plan(memo.profile(tower(2), signal(), tiles=how == "tiled"), **HOW[how]).forecast.host_bytes
    model, plain = memo.wrap(tower(2), host_budget=needed, **HOW[how]), tower(2)
    for _ in range(2):
        step(model, signal())
    kept: list[Tensor] = []

    def forward() -> None:
        x = model.first(signal())
        kept.append(model.layers[0](x))
        raise_in_second(x)

    def raise_in_second(x: Tensor) -> None:
        handle = model.layers[1].mlp.register_forward_pre_hook(interrupt)
        try:
            model.layers[1](x)
        finally:
            handle.remove()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forward()
    assert_given_up(model, plain, kept)
