"""A rerun that is found wrong costs one step: from the next one on the block and its equals run in a safer way."""

from __future__ import annotations

import copy
import logging
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.errors import PlanInfeasibleError, ReplayMismatchError
from memo_runtime.persist import load_plan, save
from memo_runtime.records import Executor

WIDTH = 16
LONG, SHIFT = 1500, 700


class LongShift(nn.Module):
    """Reads a token that lies farther back than the profiled crop is long.

    Python asks whether there are such tokens: a crop runs none of the operators that would show it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        far = functional.pad(x[:, :-SHIFT], (0, 0, SHIFT, 0)) if x.shape[1] > SHIFT else torch.zeros_like(x)
        return x + functional.gelu(self.linear(torch.cat([x, far], -1)))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(x)))


class Drawn(Plain):
    """Draws a number that PyTorch does not know of where a crop is too short for it: no rerun is the forward."""

    def forward(self, x: Tensor) -> Tensor:
        scale = random.random() if x.shape[1] > 600 else 1.0
        return x + self.down(functional.gelu(self.up(x) * scale))


class OnlyLong(Plain):
    """Takes few tokens or many, and none of the lengths between."""

    def forward(self, x: Tensor) -> Tensor:
        if 600 < x.shape[1] < LONG:
            raise ValueError("neither short nor long")
        return super().forward(x)


class Tower(nn.Module):
    def __init__(self, *kinds: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(kind() for kind in kinds)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def tower(*kinds: type[nn.Module]) -> Tower:
    torch.manual_seed(0)
    return Tower(*kinds).double()


def sequence(tokens: int = LONG, seed: int = 1) -> Tensor:
    return torch.randn(2, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def wrap(plain: nn.Module, **settings: object) -> nn.Module:
    model = copy.deepcopy(plain)
    settings = {"policy": "memo", "alpha": 0.37, "keep_last": 0} | settings
    return memo.wrap(model, blocks=list(model.layers), **settings)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    model(x).backward()
    return [p.grad for p in model.parameters()]


def assert_like(plain: nn.Module, model: nn.Module, x: Tensor) -> None:
    for want, got in zip(gradients(plain, x), gradients(model, x), strict=True):
        assert torch.linalg.vector_norm(want - got) <= 1e-12 * torch.linalg.vector_norm(want)


def fail_once(model: nn.Module, x: Tensor, match: str = "From the next step on it is run again as a whole") -> None:
    with pytest.raises(ReplayMismatchError, match=match):
        model(x).backward()


def executors(model: nn.Module) -> list[tuple[Executor, bool]]:
    return [(block.executor, "run again" in block.reason) for block in memo.report(model).blocks]


def test_the_next_step_runs_the_block_and_its_equals_as_a_whole(caplog):
    plain = tower(LongShift, Plain, LongShift)
    model = wrap(plain)
    fail_once(model, sequence(), "1 blocks like it")
    with caplog.at_level(logging.WARNING, logger="memo_runtime"):
        for seed in range(3):
            assert_like(plain, model, sequence(seed=seed))
    assert executors(model) == [(Executor.RECOMPUTE, True), (Executor.REPLAY, False), (Executor.RECOMPUTE, True)]
    said = [record.getMessage() for record in caplog.records if "a short crop did not show" in record.getMessage()]
    assert len(said) == 1
    assert "'layers.0' and 1 more" in said[0]
    assert any("a short crop did not show" in note for note in memo.report(model).notes)


def test_it_survives_other_shapes_and_comes_with_the_plan_of_each():
    plain = tower(LongShift, LongShift)
    model = wrap(plain)
    assert_like(plain, model, sequence(900)[:, :600])  # below the shift: right, and its plan is remembered
    fail_once(model, sequence())
    for tokens in (600, LONG, 1200):
        assert_like(plain, model, sequence(tokens))
        assert executors(model) == [(Executor.RECOMPUTE, True)] * 2
    assert_like(plain, model, torch.cat([sequence(), sequence()]))  # profiled anew
    assert executors(model) == [(Executor.RECOMPUTE, True)] * 2


def test_strict_leaves_it_at_the_error():
    model = wrap(tower(LongShift, LongShift), strict=True)
    for _ in range(2):
        with pytest.raises(ReplayMismatchError) as error:
            model(sequence()).backward()
        assert "next step" not in str(error.value)


def test_the_witness_goes_on_and_then_nothing_is_run_again():
    plain = tower(Drawn, Plain)
    model = wrap(plain)
    random.seed(0)
    fail_once(model, sequence())
    fail_once(model, sequence(), "what it saves is swapped whole")
    found = []
    for each in (plain, model):
        random.seed(5)
        found.append(gradients(each, sequence()))
    assert all(torch.equal(want, got) for want, got in zip(found[0][:6], found[1][:6], strict=True))
    first, second = memo.report(model).blocks
    assert (first.executor, first.alpha) == (Executor.REPLAY, 1.0)
    assert "nothing of it is run again" in first.reason
    assert second.alpha == 0.3413333333333333
    assert not second.reason


def test_a_block_that_fails_on_a_slice_is_run_as_a_whole():
    plain = tower(OnlyLong, OnlyLong)
    model = wrap(plain)
    fail_once(model, sequence(), "ValueError: neither short nor long")
    assert_like(plain, model, sequence())
    assert executors(model) == [(Executor.RECOMPUTE, True)] * 2


def test_a_budget_that_no_longer_fits_is_refused_with_the_reason():
    model = wrap(tower(*[Drawn] * 3), policy="recompute", alpha=None, host_budget="4MB")
    fail_once(model, sequence())
    fail_once(model, sequence(), "what it saves is swapped whole")
    with pytest.raises(PlanInfeasibleError) as error:
        model(sequence())
    assert "host_budget='" in str(error.value)
    assert "since      'layers.0' and 2 more: run again as a whole it made something else" in str(error.value)


def test_a_given_plan_changes_for_those_blocks_alone_and_its_file_does_not(tmp_path):
    plain = tower(LongShift, Plain, LongShift)
    plan = memo.plan(memo.profile(plain, sequence(), blocks=list(plain.layers)), policy="memo", alpha=0.37, keep_last=1)
    save(plan, tmp_path / "plan.json")
    model = memo.wrap(copy.deepcopy(plain), plan=tmp_path / "plan.json")
    fail_once(model, sequence())
    assert_like(plain, model, sequence())
    assert executors(model) == [(Executor.RECOMPUTE, True), (Executor.REPLAY, False), (Executor.KEEP, False)]
    before, now = plan.blocks[1], memo.report(model).blocks[1]
    assert (now.bytes_to_host, now.recomputed_flops) == (before.bytes_to_host, before.recomputed_flops)
    assert load_plan(tmp_path / "plan.json") == plan


class Interrupted(Plain):
    """Ctrl-C arrives in a rerun, where PyTorch is leaving a dispatch mode and raises over it."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == LONG:
            type(self).runs += 1
            if type(self).runs == 3:  # two forwards, then the first rerun
                try:
                    raise KeyboardInterrupt
                finally:
                    raise RuntimeError("trying to pop from empty mode stack")
        return super().forward(x)


def test_an_interrupt_that_another_error_hides_is_the_interrupt() -> None:
    model = memo.wrap(tower(Interrupted, Interrupted), policy="recompute", keep_last=0)
    model(sequence(40))
    Interrupted.runs = 0
    with pytest.raises(KeyboardInterrupt):
        model(sequence()).backward()
    for _ in range(2):
        model(sequence()).backward()
    assert [block.reason for block in memo.report(model).blocks] == ["", ""]


def test_an_interrupt_that_the_caller_handles_hides_no_error() -> None:
    """A step from inside an ``except KeyboardInterrupt`` falls back as any other does."""
    model = memo.wrap(tower(OnlyLong, OnlyLong), policy="memo", alpha=0.5, keep_last=0)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(ReplayMismatchError):
            model(sequence()).backward()
        model(sequence()).backward()
