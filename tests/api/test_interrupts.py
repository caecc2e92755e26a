"""Ctrl-C and errors in the middle of a step: nothing stays held, and the next step has the right gradients."""

from __future__ import annotations

import _thread
import operator
import signal as signals
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.errors import HostLimitError, PinningError
from tests.api.main_ways import MAIN_POLICIES
from tests.api.subjects import acted, assert_nothing_held, assert_trains_as, llama, refused, step
from tests.api.towers import POLICIES, Tower, signal, tower


class BrokenError(RuntimeError):
    """Raised in a module of the user's."""


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def fail(*_: Any) -> None:
    raise BrokenError("a part of the model failed")


ERRORS: dict[str, tuple[type[BaseException], Callable[..., None]]] = {
    "Ctrl-C": (KeyboardInterrupt, interrupt),
    "error": (BrokenError, fail),
}


class Backward(torch.autograd.Function):
    """Passes a tensor on and calls ``action`` when its gradient comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, action: Callable[[], None]) -> Tensor:
        ctx.action = action
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.action()
        return gradient, None


class Fuse:
    """Where a trap is armed, what it does, and how often it holds still first."""

    def __init__(self) -> None:
        self.where = ""
        self.action: Callable[..., None] = interrupt
        self.skip = 0


class Trap(nn.Module):
    """Does nothing until it is armed; then it raises in forward or in backward, at the ``skip``-th time.

    Its state is behind a function, where profiling does not find it: what it finds it puts back after every run.
    """

    def __init__(self) -> None:
        super().__init__()
        fuse = Fuse()
        self.fuse = lambda: fuse

    where = property(lambda self: self.fuse().where, lambda self, value: setattr(self.fuse(), "where", value))
    action = property(lambda self: self.fuse().action, lambda self, value: setattr(self.fuse(), "action", value))
    skip = property(lambda self: self.fuse().skip, lambda self, value: setattr(self.fuse(), "skip", value))

    def spring(self) -> None:
        if self.skip:
            self.skip -= 1
            return
        self.where = ""
        self.action()

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "forward":
            self.spring()
        return Backward.apply(x, self.spring) if self.where == "backward" else x


def trapped(block: int) -> tuple[Tower, Trap]:
    """A tower with a trap between the norm and the MLP of one of its blocks."""
    model, trap = tower(), Trap()
    model.layers[block].mlp.insert(1, trap)
    return model, trap


def caught(error: type[BaseException], call: Callable[..., Any], *args: Any) -> None:
    """Swallow ``error`` and everything that its traceback holds."""
    happened = False
    try:
        call(*args)
    except error:
        happened = True
    assert happened, f"{error.__name__} was not raised"


PLACES = ["forward", "backward"]


#: Every kind, policy and place in the middle block; Ctrl-C in the outer ones.
INSIDE = [
    pytest.param(kind, policy, where, 1, marks=() if policy == "memo" or kind == "Ctrl-C" else pytest.mark.slow)
    for kind in ERRORS
    for policy in POLICIES
    for where in PLACES
]
INSIDE += [("Ctrl-C", "memo", where, block) for where in PLACES for block in (0, 2)]


@pytest.mark.parametrize(("kind", "policy", "where", "block"), INSIDE)
def test_inside_a_block(kind: str, policy: str, where: str, block: int) -> None:
    error, action = ERRORS[kind]
    (model, trap), (plain, _) = trapped(block), trapped(block)
    memo.wrap(model, **POLICIES[policy])
    assert_trains_as(model, plain, signal())
    for _ in range(2):
        trap.where, trap.action = where, action
        caught(error, step, model, signal(seed=2))
        trap.where = ""
        assert_nothing_held(model)
        assert_trains_as(model, plain, signal(seed=3))
        acted(model)
    assert_nothing_held(model)
    assert_trains_as(memo.unwrap(model), plain, signal())


@pytest.mark.anew
@pytest.mark.parametrize("skip", [0, 1, 3, 6, 8])
def test_ctrl_c_while_the_first_step_is_profiled(skip: int) -> None:
    (model, trap), (plain, _) = trapped(1), trapped(1)
    memo.wrap(model, **POLICIES["memo"])
    trap.where, trap.skip = "forward", skip
    random = torch.get_rng_state()
    caught(KeyboardInterrupt, step, model, signal())
    assert torch.equal(torch.get_rng_state(), random)
    for _ in range(2):
        assert_trains_as(model, plain, signal())
        acted(model)
    assert_nothing_held(model)


@pytest.mark.anew
@pytest.mark.parametrize("skip", [0, 2])
def test_an_error_while_the_first_step_is_profiled_is_why_a_block_falls_back(skip: int) -> None:
    """Profiling finds out what a block cannot do by trying; the error is in the report."""
    (model, trap), (plain, _) = trapped(1), trapped(1)
    memo.wrap(model, **POLICIES["memo"])
    trap.where, trap.action, trap.skip = "forward", fail, skip
    for _ in range(2):
        assert_trains_as(model, plain, signal())
    assert any("layers.1" in note and "a part of the model failed" in note for note in memo.report(model).notes)
    assert_nothing_held(model)


@pytest.mark.parametrize("where", PLACES)
def test_a_module_that_always_fails_fails_with_its_own_error(where: str) -> None:
    (model, trap), (plain, _) = trapped(1), trapped(1)
    memo.wrap(model, **POLICIES["memo"])
    handle = trap.register_forward_hook(fail) if where == "forward" else trap.register_full_backward_hook(fail)
    for _ in range(2):
        caught(BrokenError, step, model, signal())
    handle.remove()
    assert_nothing_held(model)
    for _ in range(2):
        assert_trains_as(model, plain, signal())
    assert_nothing_held(model)


@pytest.mark.parametrize("kind", ERRORS)
def test_while_a_block_is_run_again(kind: str) -> None:
    error, action = ERRORS[kind]
    (model, trap), (plain, _) = trapped(1), trapped(1)
    memo.wrap(model, **POLICIES["memo"])
    assert_trains_as(model, plain, signal())
    trap.where, trap.action, trap.skip = "forward", action, 1  # once in the forward, then in the rerun
    caught(error, step, model, signal(seed=2))
    assert trap.where == ""
    assert_nothing_held(model)
    assert_trains_as(model, plain, signal(seed=3))
    acted(model)
    assert_nothing_held(model)


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("hook", ["forward", "pre", "backward", "tensor"])
def test_from_a_hook(hook: str, kind: str) -> None:
    error, action = ERRORS[kind]
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    step(model, signal())
    mlp = model.layers[1].mlp

    def on_tensor(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(action)

    handle = {
        "forward": lambda: mlp.register_forward_hook(action),
        "pre": lambda: model.layers[1].register_forward_pre_hook(action),
        "backward": lambda: mlp.register_full_backward_hook(action),
        "tensor": lambda: model.layers[1].register_forward_hook(on_tensor),
    }[hook]()
    caught(error, step, model, signal(seed=2))
    handle.remove()
    assert_nothing_held(model)
    assert_trains_as(model, plain, signal(seed=3))
    acted(model)


@pytest.mark.parametrize("where", PLACES)
def test_between_blocks_that_stay_on_the_device(where: str) -> None:
    (model, trap), (plain, _) = trapped(2), trapped(2)
    memo.wrap(model, policy="memo", alpha=0.37, keep_last=2)
    assert_trains_as(model, plain, signal())
    trap.where = where
    caught(KeyboardInterrupt, step, model, signal())
    trap.where = ""
    assert_nothing_held(model)
    assert_trains_as(model, plain, signal())
    acted(model)
    assert_nothing_held(model)


def test_outside_the_blocks() -> None:
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    step(model, signal())
    for module in (model.first, model.last):
        handle = module.register_forward_hook(interrupt)
        caught(KeyboardInterrupt, step, model, signal())
        handle.remove()
        assert_nothing_held(model)
        assert_trains_as(model, plain, signal())
        acted(model)


@pytest.mark.parametrize("name", ["self_attn", "mlp"])
def test_in_a_causal_lm(name: str) -> None:
    model, plain = memo.wrap(llama(), **POLICIES["memo"]), llama()
    assert_trains_as(model, plain)
    module = getattr(model.model.layers[1], name)
    for register in (module.register_forward_hook, module.register_full_backward_hook):
        handle = register(interrupt)
        caught(KeyboardInterrupt, step, model)
        handle.remove()
        assert_nothing_held(model)
        assert_trains_as(model, plain)
        acted(model)


def test_an_interrupted_accumulation_goes_on() -> None:
    """Gradients of the steps before stay; the interrupted micro-batch can be given again."""
    (model, trap), (plain, _) = trapped(0), trapped(0)
    memo.wrap(model, **POLICIES["recompute"])

    def add(m: nn.Module, seed: int) -> None:
        m(signal(seed=seed)).square().mean().backward()

    add(model, 1)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    trap.where = "forward"
    caught(KeyboardInterrupt, add, model, 2)
    for p, want in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad, want)
    for seed in (2, 3):
        add(model, seed)
    for seed in (1, 2, 3):
        add(plain, seed)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-14)
    acted(model)


@pytest.mark.parametrize("steps", [0, 1])
def test_host_memory_that_cannot_be_had(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system has less than the limit says: the allocation itself fails."""
    from memo_runtime.native.backend import CompiledBackend, TorchBackend

    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    for _ in range(steps):
        step(model, signal(tokens=17))

    def none_left(self: Any, size_bytes: int, *, allow_partial: bool = False) -> None:
        raise PinningError("no memory")

    with monkeypatch.context() as patch:
        for backend in (CompiledBackend, TorchBackend):
            patch.setattr(backend, "slab", none_left)
        refused(PinningError, step, model, signal(tokens=40))
        refused(PinningError, step, model, signal(tokens=40))
    assert_nothing_held(model)
    for tokens in (40, 17):
        assert_trains_as(model, plain, signal(tokens=tokens))
        acted(model)
    assert_nothing_held(model)


@pytest.mark.parametrize("policy", MAIN_POLICIES)
def test_host_memory_runs_out_in_the_middle_of_a_forward(policy: str) -> None:
    """Two forwards alive, with room for one and a half: it runs out at the second forward's second block."""
    needed = memo.plan(memo.profile(tower(), signal()), **POLICIES[policy]).forecast.host_bytes
    model, plain = memo.wrap(tower(), host_budget=needed * 3 // 2, **POLICIES[policy]), tower()
    assert_trains_as(model, plain, signal())
    entered: list[int] = []
    for number, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda module, args, number=number: entered.append(number))
    alive = model(signal())
    entered.clear()
    refused(HostLimitError, model, signal(seed=2))
    assert entered in ([0], [0, 1])
    del alive
    assert_nothing_held(model)
    for seed in (2, 3):
        assert_trains_as(model, plain, signal(seed=seed))
        acted(model)
    assert_nothing_held(model)


@pytest.mark.parametrize("how", [*POLICIES, "kept"])
def test_ctrl_c_while_the_engine_lets_go_is_not_lost(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt that arrives during a kernel is raised in the first Python code that runs after it. In a destructor
    it would be printed and forgotten, so what the graph holds has none. Here a function of C does both.
    """
    model, plain = memo.wrap(tower(), **POLICIES.get(how, {"policy": "swap", "keep_last": 3})), tower()
    lost: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: lost.append(what.object))
    before = signals.signal(signals.SIGUSR1, interrupt)
    try:
        for _ in range(2):
            graph = [model(signal())]
            parts = [partial(_thread.interrupt_main, signals.SIGUSR1), graph.clear]
            with pytest.raises(KeyboardInterrupt):
                deque(map(operator.call, parts), maxlen=0)
    finally:
        signals.signal(signals.SIGUSR1, before)
    assert graph == []
    assert lost == []
    assert_nothing_held(model)
    assert_trains_as(model, plain, signal())
