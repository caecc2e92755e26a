"""Parametrized weights under ``torch.nn.utils.parametrize.cached()``: computed once, whoever reads them."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import memo_runtime as memo
from memo_runtime.records import Executor
from tests.exactness.compare import TOLERANCE, WAYS, Way, relative_error, take_gradients, weighted
from tests.exactness.hand_written import WIDTH, sequence


class Twice(nn.Module):
    """Reads its normed weight twice, which is computed once where it is kept."""

    def __init__(self, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.normed = weight_norm(nn.Linear(WIDTH, WIDTH)) if shared is None else shared
        self.down = weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.normed(self.normed(x).tanh()).sigmoid())


class Stack(nn.Module):
    """``shared``: all blocks have one of their layers in common."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        first = Twice()
        self.layers = nn.ModuleList([first, *(Twice(first.normed if shared else None) for _ in range(2))])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def kept_table() -> tuple[int, int]:
    return parametrize._cache_enabled, len(parametrize._cache)


def step(model: nn.Module, *, backward_inside: bool, calls: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """``calls`` forwards under one ``cached()``, and one backward of all of them."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(parametrize.cached())
        losses = [weighted(model(sequence(rows=number + 2))) for number in range(calls)]
        if not backward_inside:
            stack.close()
        torch.stack(losses).sum().backward()
    assert kept_table() == (0, 0)
    return [loss.detach() for loss in losses], take_gradients(model)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("backward_inside", [False, True], ids=["closed", "open"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("way", [*WAYS, Way("tiled"), Way("auto")], ids=str)
def test_steps_are_the_models(way: Way, calls: int, *, shared: bool, backward_inside: bool) -> None:
    torch.manual_seed(0)
    model = Stack(shared=shared).double()
    wants = step(model, backward_inside=backward_inside, calls=calls)
    way.wrap(model)
    for _ in range(3):
        losses, gradients = step(model, backward_inside=backward_inside, calls=calls)
        for got, want in zip(losses, wants[0], strict=True):
            assert abs(float(got - want)) <= TOLERANCE * abs(float(want))
        assert relative_error(gradients, wants[1]) <= TOLERANCE
    blocks = memo.report(model).blocks
    assert all(block.executor is not Executor.NATIVE for block in blocks), [block.reason for block in blocks]


def test_a_profile_leaves_the_table_as_it_was() -> None:
    torch.manual_seed(0)
    model = Stack(shared=False).double()
    with parametrize.cached():
        known = model.layers[0].normed.weight
        memo.profile(model, (sequence(),), tiles=True)
        assert kept_table() == (1, 1)
        assert model.layers[0].normed.weight is known
