"""What a forward reads beside its module and arguments: every change is seen, and nothing that a run left stays."""

from __future__ import annotations

import functools
import gc
import os
import random
import sys
from typing import ClassVar

import numpy
import pytest
import torch
from torch import Tensor, nn

from memo_runtime.blocks.outside import Outside

SCALE = 1.0
TABLE = {"scale": 1.0}
ARRAY = numpy.ones(3)
LOSSES: list[Tensor] = []
CALLS = 0
GENERATOR = random.Random(0)


class Config:
    scale = 1.0


class Tracker:
    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.calls = 0

    def add(self, value: Tensor) -> None:
        self.losses.append(value)
        self.calls += 1


def double(x: Tensor) -> Tensor:
    return 2 * x


def tripled(x: Tensor, by: list[float] = [3.0]) -> Tensor:  # noqa: B006
    return by[0] * x


def closed_over(value: float):
    def get() -> float:
        return value

    def put(other: float) -> None:
        nonlocal value
        value = other

    return get, put


CONFIG, TRACKER = Config(), Tracker()
GET, PUT = closed_over(1.0)


class Reads(nn.Module):
    factor = 1.0
    options: ClassVar = {"scale": 1.0}

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.config = Config()

    @property
    def hidden(self) -> float:
        return SCALE

    def own(self) -> float:
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x) * self.factor * self.options["scale"] * self.hidden * self.own() * self.config.scale
        x = x * CONFIG.scale * TABLE["scale"] * float(ARRAY[1]) * GET() * float(os.environ.get("OF_A_TEST", 1))
        local = [x]
        [local.append(one) for one in local[:1]]
        return tripled(double(local[1]))


def looked_at(module: nn.Module) -> Outside:
    kinds = [type(one) for one in vars(module).values() if isinstance(one, Config)]
    outside = Outside(module, kinds)
    with outside:
        module(torch.ones(1, 2))
    assert outside.written() == ""
    return outside.settle()


CHANGES = {
    "attribute 'factor' of class Reads": lambda patch: patch.setattr(Reads, "factor", 2.0),
    "attribute 'options' of class Reads": lambda patch: patch.setitem(Reads.options, "scale", 2.0),
    "attribute 'own' of class Reads": lambda patch: patch.setattr(Reads, "own", lambda self: 2.0),
    "attribute 'scale' of class Config": lambda patch: patch.setattr(Config, "scale", 2.0),
    "attribute 'forward' of class Linear": lambda patch: patch.setattr(nn.Linear, "forward", lambda self, x: x),
    "global 'SCALE'": lambda patch: patch.setitem(globals(), "SCALE", 2.0),
    "global 'double'": lambda patch: patch.setitem(globals(), "double", abs),
    "global 'TABLE'": lambda patch: patch.setitem(TABLE, "scale", 2.0),
    "'scale' of global 'CONFIG'": lambda patch: patch.setattr(CONFIG, "scale", 2.0, raising=False),
    "'linear' of module torch.nn.functional": lambda patch: patch.setattr(nn.functional, "linear", abs),
    "environment variable b'OF_A_TEST'": lambda patch: patch.setenv("OF_A_TEST", "2"),
}


@pytest.mark.parametrize("words", CHANGES)
def test_a_change_is_seen_and_named(words, monkeypatch):
    outside = looked_at(Reads())
    assert outside.changed() == ""
    CHANGES[words](monkeypatch)
    assert words in outside.changed()
    monkeypatch.undo()
    assert outside.changed() == ""


@pytest.mark.parametrize(("words", "place", "value"), [
    ("global 'ARRAY'", (ARRAY, 1), 1.0), ("a default of tripled", (tripled.__defaults__[0], 0), 3.0),
])  # fmt: skip
def test_a_member_that_changes(words, place, value):
    outside, (holder, key) = looked_at(Reads()), place
    holder[key] = 2.0
    assert words in outside.changed()
    holder[key] = value
    assert outside.changed() == ""


def test_a_variable_of_a_closure():
    outside = looked_at(Reads())
    PUT(2.0)
    assert "'value' of the closure of closed_over.<locals>.get" in outside.changed()
    PUT(1.0)
    assert outside.changed() == ""


def test_an_equal_number_is_no_change(monkeypatch):
    outside = looked_at(Reads())
    monkeypatch.setitem(globals(), "SCALE", float("1.0"))
    monkeypatch.setitem(globals(), "OTHER", 3)
    assert outside.changed() == ""


def logged(function):
    @functools.wraps(function)
    def run(*args):
        return function(*args)

    return run


class Decorated(nn.Module):
    @logged
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    @logged
    def inner(self, x: Tensor) -> Tensor:
        return 2 * x

    @logged
    def other(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_what_one_decorator_has_made_is_told_apart():
    looked_at(Decorated())


class Writes(nn.Module):
    calls = 0

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        global CALLS
        if self.what == "list":
            LOSSES.append(x)
        if self.what == "tracker":
            TRACKER.add(x)
        if self.what == "global":
            CALLS += 1
        if self.what == "class":
            Writes.calls += 1
        if self.what == "dict":
            TABLE["new"] = 1.0
        if self.what == "closure":
            PUT(GET() + 1.0)
        if self.what == "generator":
            return x * GENERATOR.random()
        return x * random.random() if self.what == "random" else x


def everything() -> tuple[object, ...]:
    lists = [*map(id, LOSSES)], [*map(id, TRACKER.losses)]
    return *lists, TRACKER.calls, CALLS, Writes.calls, dict(TABLE), GET(), GENERATOR.getstate(), random.getstate()


@pytest.mark.parametrize("what", [
    "list", "tracker", "global", "class", "dict", "closure", "generator", "random",
])  # fmt: skip
def test_what_a_run_writes_is_seen_and_undone(what):
    module = Writes(what)
    LOSSES.append(torch.ones(1))
    before = everything()
    outside = Outside(module)
    with outside:
        module(torch.ones(1, 2))
    assert everything() != before
    assert outside.written()
    outside.put_back()
    assert everything() == before
    LOSSES.clear()


def test_tensors_are_not_held():
    LOSSES.append(torch.ones(1))
    outside = Outside(Writes("list"))
    with outside:
        Writes("list")(torch.ones(1, 2))
    outside.settle()
    LOSSES[:] = [torch.ones(1), torch.ones(1)]
    assert outside.changed() == ""
    LOSSES.clear()
    assert outside.changed()


def test_a_tracer_that_is_there_comes_back():
    mine = functools.partial(lambda *_: None)
    before = sys.gettrace()
    sys.settrace(mine)
    try:
        with Outside(Reads()):
            assert sys.gettrace() is not mine
        assert sys.gettrace() is mine
    finally:
        sys.settrace(before)


class Collecting(nn.Module):
    """Makes garbage in cycles, enough for several collections."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(20_000):
            cycle: list[object] = []
            cycle.append(cycle)
        return x


def test_what_is_called_when_garbage_is_collected_is_no_part_of_the_block(monkeypatch):
    """hypothesis has such a callback, which writes to a global."""
    called: list[str] = []

    def counts(phase: str, info: dict[str, int]) -> None:
        global CALLS
        CALLS += 1
        called.append(phase)

    monkeypatch.setattr(sys.modules[__name__], "CALLS", 0)
    gc.callbacks.append(counts)
    try:
        Collecting()(torch.ones(2))
        assert called
        block = Collecting()
        outside = Outside(block)
        with outside:
            block(torch.ones(2))
        assert outside.written() == ""
        assert gc.isenabled()
    finally:
        gc.callbacks.remove(counts)
