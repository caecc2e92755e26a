"""Blocks that make their input again from the stash of the block below: exact, to the byte, and only where it is so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.errors import ReplayMismatchError
from memo_runtime.records import Plan
from tests.exactness import hand_written
from tests.exactness.chains import with_runs
from tests.exactness.compare import assert_clean, assert_trade, model_loss, output_loss, run_step
from tests.exactness.models import FAMILIES
from tests.exactness.test_tiled import assert_close, batch_of
from tests.execution.test_tiled_families import _MORE

BLOCKS = 3


def model_of(count: int = BLOCKS) -> nn.Module:
    torch.manual_seed(0)
    return hand_written.Stack(*(hand_written.Attention() for _ in range(count))).double()


@pytest.fixture(scope="module")
def profile() -> memo.Profile:
    return memo.profile(model_of(), batch_of(), tiles=True)


def planned(profile: memo.Profile, every: int, *, late: bool = False, **changes: Any) -> Plan:
    wanted = {"policy": "tiled", "tile": 8, "alpha": 0.5, "keep_last": 0} | changes
    return with_runs(memo.plan(profile, **wanted), every, late=late)


@contextmanager
def wrapped(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    memo.wrap(model, plan=plan, loss="native")
    yield model
    memo.unwrap(model)


def assert_as_planned(model: nn.Module) -> None:
    assert_trade(model)
    totals = memo.report(model).totals
    assert totals.stash_peak_bytes == totals.forecast.stash_peak_bytes
    assert totals.host_bytes == totals.forecast.host_bytes
    assert_clean(model)


def assert_steps_as_planned(plan: Plan) -> None:
    model, batch = model_of(), batch_of()
    want = run_step(model, batch, output_loss)
    with wrapped(model, plan):
        for _ in range(2):
            assert_close(run_step(model, batch, output_loss), want)
        assert_as_planned(model)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("every", "keep_last", "alpha"), [(2, 0, 0.5), (4, 1, 0.3), slow(2, 2, 0.5), slow(4, 0, 0.0), slow(4, 3, 1.0)]
)
def test_runs_of_blocks(profile, every, keep_last, alpha):
    plan = planned(profile, every, keep_last=keep_last, alpha=alpha)
    assert [block.from_below for block in plan.blocks] == [bool(number % every) for number in range(BLOCKS)]
    assert_steps_as_planned(plan)


@pytest.mark.parametrize(
    ("every", "keep_last", "alpha"), [(4, 1, 0.3), slow(1, 0, 0.0), slow(2, 0, 0.5), slow(4, 0, 0.0), slow(4, 2, 1.0)]
)
def test_late_runs_of_blocks(profile, every, keep_last, alpha):
    """Inputs are made one after another; what they are made of comes once for each block above it in the run."""
    plan = planned(profile, every, keep_last=keep_last, alpha=alpha, late=True)
    following = [min(BLOCKS, (number // every + 1) * every) - number - 1 for number in range(BLOCKS)]
    assert [block.passes for block in plan.blocks] == following
    assert_steps_as_planned(plan)
    if every == BLOCKS + 1 and not keep_last:
        early = planned(profile, every, alpha=alpha)
        assert plan.forecast.host_bytes == early.forecast.host_bytes
        assert plan.forecast.stash_peak_bytes < early.forecast.stash_peak_bytes


def test_what_it_saves_in_host_memory(profile):
    """Of x, o and the log-sum-exp of three blocks the x of one, or of two."""
    x = 3 * 17 * hand_written.WIDTH * 8
    whole, *runs = (planned(profile, every).forecast.host_bytes for every in (1, 2, 4))
    assert [whole - one for one in runs] == [x, 2 * x]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "every", "late"),
    [("llama", 4, False), ("gpt-neox", 2, False), ("phi3", 2, False), ("llama", 4, True), ("qwen3", 4, True)],
)
def test_families(name, every, late):
    family = (FAMILIES | _MORE)[name]
    model, batch = family.make(num_hidden_layers=4), family.batch(rows=2, tokens=13)
    want = run_step(model, batch, model_loss)
    plan = planned(memo.profile(model, batch, tiles=True), every, late=late)
    assert sum(block.from_below for block in plan.blocks) == 4 - 4 // every
    with wrapped(model, plan):
        assert_close(run_step(model, batch, model_loss), want)
        assert_as_planned(model)


@pytest.mark.slow
def test_dropout_is_drawn_as_before():
    """GPT-2 with dropout: the same masks as where every input is stashed, in late runs too."""
    model, batch = FAMILIES["gpt2"].make(), FAMILIES["gpt2"].batch(rows=3, tokens=13)
    model.train()
    profile = memo.profile(model, batch, tiles=True)
    steps = []
    for every, late in ((1, False), (2, False), (2, True)):
        with wrapped(model, planned(profile, every, late=late)):
            torch.manual_seed(7)
            steps.append(run_step(model, batch, model_loss))
            assert [block.executor for block in memo.report(model).blocks] == ["tiled", "tiled"]
    assert_close(steps[1], steps[0])
    assert_close(steps[2], steps[0])
    assert any(module.p > 0 for module in model.modules() if isinstance(module, nn.Dropout))


@pytest.mark.slow
def test_t5_stashes_every_input():
    """Its blocks hand on a bias with a gradient beside their result."""
    model, batch = FAMILIES["t5"].make(), FAMILIES["t5"].batch(rows=2, tokens=13)
    plan = planned(memo.profile(model, batch, tiles=True), 2)
    assert not any(block.from_below for block in plan.blocks)


class Between(hand_written.Stack):
    """Does something to what one block hands to the next."""

    what: Callable[[Tensor], Tensor] = staticmethod(lambda x: x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for number, block in enumerate(self.blocks):
            x = block(self.what(x) if number else x)
        return x


def double(x: Tensor) -> Tensor:
    return 2 * x


def written_without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(2)
    return x


@pytest.mark.slow
def test_a_model_that_does_something_between_its_blocks():
    torch.manual_seed(0)
    for what in (double, written_without_grad):
        model = Between(*(hand_written.Attention() for _ in range(2))).double()
        model.what = what
        profile = memo.profile(model, batch_of(), tiles=True)
        assert [block.tiled.chained for block in profile.blocks if block.tiled] == [False, False]
        assert not any(block.from_below for block in planned(profile, 2).blocks)


@pytest.mark.parametrize(
    ("what", "late"),
    [(written_without_grad, False), slow(written_without_grad, True), slow(double, False), slow(torch.clone, False),
     slow(lambda x: x.view_as(x), True)],
)  # fmt: skip
def test_what_comes_between_later(what, late):
    """Planned for results that are handed on as they are; the next step is planned anew, within the plan's limits."""
    torch.manual_seed(0)
    model, batch = Between(*(hand_written.Attention() for _ in range(3))).double(), batch_of()
    plan = planned(memo.profile(model, batch, tiles=True), 2, late=late)
    assert [block.from_below for block in plan.blocks] == [False, True, False]
    model.what = what
    want = run_step(model, batch, output_loss)
    with wrapped(model, plan):
        assert_close(run_step(model, batch, output_loss), want)
        first = memo.report(model)
        assert any("is not the result of the block below" in note for note in first.notes)
        assert first.blocks[1].bytes_kept > plan.blocks[1].bytes_kept
        assert first.totals.host_bytes_in_use == 0
        assert_close(run_step(model, batch, output_loss), want)
        second = memo.report(model)
        assert second.blocks[1].bytes_to_host == first.blocks[0].bytes_to_host
        assert_trade(model)


@pytest.mark.slow
def test_hooks_on_a_block_that_change_its_result(profile):
    model, batch = model_of(), batch_of()
    model.blocks[1].register_forward_hook(lambda module, args, output: output + 1)
    want = run_step(model, batch, output_loss)
    with wrapped(model, planned(profile, 4)):
        for _ in range(2):
            assert_close(run_step(model, batch, output_loss), want)


@pytest.mark.parametrize("late", [False, True])
def test_what_autograd_does_not_see_is_an_error(profile, late):
    model = model_of()
    with wrapped(model, planned(profile, 2, late=late)):
        model.blocks[0].register_forward_hook(lambda module, args, output: _spoil(output))
        with pytest.raises(ReplayMismatchError, match="is not what it was given"):
            run_step(model, batch_of(), output_loss)


def _spoil(output: Tensor) -> None:
    output.data.mul_(2)


def gradients(model: nn.Module) -> list[Tensor]:
    return [one.grad.clone() for one in model.parameters() if one.grad is not None]


class Branch(hand_written.Stack):
    """Also yields what its second block yields."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.blocks[1](self.blocks[0](self.embed(x)))
        return self.blocks[2](middle), middle


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("order", ["lower first", slow("twice"), slow("two steps"), slow("accumulated")])
def test_several_backward_passes(order, late):
    """The lower blocks go backward before the ones above; or all of them twice; or two forwards before both."""
    torch.manual_seed(0)
    model, batch = Branch(*(hand_written.Attention() for _ in range(3))).double(), batch_of()
    plan = planned(memo.profile(model, batch, tiles=True), 4, late=late)
    assert [block.from_below for block in plan.blocks] == [False, True, True]

    def step() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        if order == "lower first":
            top, middle = model(**batch)
            wanted = [one for block in model.blocks[:2] for one in block.parameters()]
            first = torch.autograd.grad(middle.square().sum(), wanted)
            above = torch.autograd.grad(top.square().sum(), list(model.blocks[2].parameters()))
            return [*first, *above]
        if order == "twice":
            loss = model(**batch)[0].square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
        if order == "two steps":
            losses = [model(x=batch["x"] * scale)[0].square().sum() for scale in (1, 2)]
            losses[0].backward()
            losses[1].backward()
        if order == "accumulated":
            for scale in (1, 2):
                model(x=batch["x"] * scale)[0].square().sum().backward()
        return gradients(model)

    want = step()
    with wrapped(model, plan):
        for _ in range(2):
            for mine, theirs in zip(step(), want, strict=True):
                assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)
        assert memo.report(model).totals.host_bytes_in_use == 0
        assert memo.report(model).totals.stash_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_frozen_weights(late):
    model, batch = model_of(), batch_of()
    for name, one in model.named_parameters():
        one.requires_grad_("up" in name)
    batch["x"].requires_grad_()
    want = run_step(model, batch, output_loss)
    with wrapped(model, planned(memo.profile(copy.deepcopy(model), batch, tiles=True), 4, late=late)):
        assert_close(run_step(model, batch, output_loss), want)
        assert_as_planned(model)
