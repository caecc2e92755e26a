"""Models without blocks, and ``blocks=`` that is no list of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.errors import BlockListError, NoBlocksError, ProfileError
from tests.api.main_ways import MAIN_POLICIES
from tests.api.subjects import acted, assert_trains_as, refused, step
from tests.api.towers import POLICIES, Tower, signal, tower

Given = Callable[[Tower], Any]

WRONG: dict[str, tuple[Given, list[str]]] = {
    "a name of nothing": (lambda m: "encoder.h", ["'encoder.h'", "names no module of Tower", "layers: ModuleList"]),
    "nearly a name": (lambda m: "layrs.0.mlp", ["did you mean 'layers.0.mlp'?", "its children: "]),
    "the end of a name": (lambda m: "mlp", ["did you mean 'layers.0.mlp' or 'layers.1.mlp'?"]),
    "a name of nothing further in": (lambda m: "layers.0.xyz", ["children of 'layers.0': "]),
    "a name of nothing in a list": (lambda m: ["layers.0", "layers.9"], ["'layers.9'", "names no module"]),
    "a block of another model": (lambda m: [tower().layers[0]], ["Block that is not part of Tower"]),
    "blocks of another model": (lambda m: tower().layers, ["Block that is not part of Tower"]),
    "one inside another": (lambda m: [m.layers[0], m.layers[0].mlp], ["'layers.0.mlp' inside or equal to 'layers.0'"]),
    "the outer one last": (lambda m: ["layers.1.mlp", "layers.1"], ["'layers.1.mlp' inside", "name each block once"]),
    "one twice": (lambda m: [m.layers[0], m.layers[1], m.layers[0]], ["'layers.0' inside or equal", "once"]),
    "one by module and by name": (lambda m: [m.layers[2], "layers.2"], ["'layers.2'", "once"]),
    "none": (lambda m: [], ["blocks is empty", "leave it out"]),
    "none of a list": (lambda m: nn.ModuleList(), ["blocks is empty"]),
    "the model itself": (lambda m: [m], ["the model itself"]),
    "the empty name": (lambda m: "", ["the model itself"]),
    "numbers": (lambda m: [0, 1], ["holds 0 (int)", "modules of the model"]),
    "a number": (lambda m: 3, ["blocks=3", "ModuleList"]),
    "a mapping": (lambda m: {"layers.0": m.layers[0]}, ["is not a list of modules"]),
    "classes": (lambda m: [type(m.layers[0])], ["holds <class", "modules of the model"]),
    "parameters": (lambda m: list(m.parameters())[:2], ["Parameter", "modules of the model"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_block_list_that_is_none(case: str) -> None:
    given, parts = WRONG[case]
    model, plain = tower(), tower()
    keys = [list(vars(module)) for module in model.modules()]
    for call in (memo.wrap, memo.profile):
        arguments = (model,) if call is memo.wrap else (model, signal())
        message = refused(BlockListError, call, *arguments, blocks=given(model))
        for part in parts:
            assert part in message
    assert [list(vars(module)) for module in model.modules()] == keys
    assert_trains_as(model, plain, signal(), bound=0)
    assert_trains_as(memo.wrap(model, **POLICIES["memo"]), plain, signal())
    acted(model)


GIVEN: dict[str, tuple[Given, list[str]]] = {
    "a ModuleList": (lambda m: m.layers, ["layers.0", "layers.1", "layers.2"]),
    "its name": (lambda m: "layers", ["layers.0", "layers.1", "layers.2"]),
    "modules": (lambda m: [m.layers[0], m.layers[2]], ["layers.0", "layers.2"]),
    "names": (lambda m: ("layers.1", "layers.2"), ["layers.1", "layers.2"]),
    "an iterator": (lambda m: iter(m.layers), ["layers.0", "layers.1", "layers.2"]),
    "one module": (lambda m: m.layers[1], ["layers.1"]),
    "one name": (lambda m: "layers.1", ["layers.1"]),
    "parts of blocks": (lambda m: [layer.mlp for layer in m.layers], [f"layers.{i}.mlp" for i in range(3)]),
}


@pytest.mark.parametrize("case", GIVEN)
def test_blocks_that_are_given(case: str) -> None:
    given, names = GIVEN[case]
    model, plain = tower(), tower()
    memo.wrap(model, blocks=given(model), **POLICIES["memo"])
    for _ in range(2):
        assert_trains_as(model, plain, signal())
        assert [block.name for block in acted(model).blocks] == names
    assert_trains_as(memo.unwrap(model), plain, signal(), bound=0)


class InSequence(Tower):
    """A tower whose stack is a ``Sequential``, called as one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: Any = nn.Sequential(*self.layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layers(self.first(x)))


@pytest.mark.parametrize("given", [None, "layers", "module"])
def test_a_sequential_is_a_stack_too(given: str | None) -> None:
    model = InSequence().double()
    plain = tower()
    plain.load_state_dict(model.state_dict())
    memo.wrap(model, blocks=model.layers if given == "module" else given, **POLICIES["memo"])
    assert_trains_as(model, plain, signal())
    assert [block.name for block in acted(model).blocks] == ["layers.0", "layers.1", "layers.2"]


class Flat(nn.Module):
    """Nothing in it repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 32), nn.SiLU())
        self.last = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


def test_no_repeated_block() -> None:
    torch.manual_seed(0)
    model = Flat().double()
    plain = Flat().double()
    plain.load_state_dict(model.state_dict())
    for call, arguments in ((memo.wrap, ()), (memo.profile, (signal(),)), (memo.check, (signal(),))):
        message = refused(NoBlocksError, call, model, *arguments)
        assert "no repeated block found in Flat" in message
        assert "first: Sequential, last: Linear" in message
        assert "blocks=" in message
    assert_trains_as(model, plain, signal(), bound=0)
    memo.wrap(model, blocks=[model.first], **POLICIES["swap"])
    assert_trains_as(model, plain, signal(), bound=0)
    acted(model)


def test_a_model_without_modules() -> None:
    assert "no repeated block found in Linear" in refused(NoBlocksError, memo.wrap, nn.Linear(2, 2))
    assert "its children: none" in refused(NoBlocksError, memo.wrap, nn.Module())


class Unused(Tower):
    """Blocks that the forward never calls."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


def test_blocks_that_are_never_called() -> None:
    model = memo.wrap(Unused().double(), **POLICIES["swap"])
    for _ in range(2):
        message = refused(ProfileError, step, model, signal())
        assert "Unused was called and none of its blocks was (layers.0, layers.1, layers.2" in message
        assert "blocks=" in message
    assert len(step(memo.unwrap(model), signal())) == 4


class Skipping(Tower):
    """A block that some steps leave out (layer drop)."""

    skipped: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for number, layer in enumerate(self.layers):
            if number != self.skipped:
                x = layer(x)
        return self.last(x)


@pytest.mark.parametrize("order", [(None, 1, 0, 2, None), (0, None, 2), (2, None, 1)], ids=str)
def test_blocks_that_are_sometimes_skipped(order: tuple[int | None, ...]) -> None:
    torch.manual_seed(0)
    model, plain = Skipping().double(), Skipping().double()
    plain.load_state_dict(model.state_dict())
    memo.wrap(model, **POLICIES["memo"])
    for skipped in order:
        model.skipped = plain.skipped = skipped
        assert_trains_as(model, plain, signal())
        assert memo.report(model).totals.host_bytes_in_use == 0
    names = [block.name for block in memo.report(model).blocks]
    assert names == [f"layers.{i}" for i in range(3) if i != order[-1]]


class Twice(Tower):
    """Every block is called twice (weights shared over depth)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in (*self.layers, *self.layers):
            x = layer(x)
        return self.last(x)


@pytest.mark.parametrize("policy", MAIN_POLICIES)
def test_blocks_that_are_called_twice(policy: str) -> None:
    torch.manual_seed(0)
    model, plain = Twice(2).double(), Twice(2).double()
    plain.load_state_dict(model.state_dict())
    memo.wrap(model, **POLICIES[policy])
    for _ in range(3):
        assert_trains_as(model, plain, signal())
        assert memo.report(model).totals.host_bytes_in_use == 0
        assert memo.report(model).totals.stash_bytes == 0
