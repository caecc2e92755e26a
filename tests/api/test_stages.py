"""Profile, plan and run as separate steps, through files; later lengths reuse the profile; ``memo.check``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.errors import PlanInfeasibleError, ReplayMismatchError
from memo_runtime.persist import load_plan, load_profile, save
from memo_runtime.profiling import model as profiling_model
from tests.api.main_ways import MAIN_POLICIES
from tests.api.subjects import acted, assert_nothing_held, assert_trains_as, llama, refused, step, totals
from tests.api.towers import BOUND, POLICIES, signal, tower
from tests.exactness.models import FAMILIES
from tests.integrations.models import batch, make

SUBJECTS: dict[str, Any] = {"tower": (tower, signal()), "llama": (llama, batch(tokens=24))}


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the blocks that were calibrated, as they come."""
    names: list[str] = []
    original = profiling_model.calibrate

    def counting(*args: Any, name: str, **how: Any) -> Any:
        names.append(name)
        return original(*args, name=name, **how)

    monkeypatch.setattr(profiling_model, "calibrate", counting)
    return names


# Through a file.


@pytest.mark.parametrize("policy", MAIN_POLICIES)
@pytest.mark.parametrize("name", SUBJECTS)
def test_profile_plan_and_run_through_files(name: str, policy: str, tmp_path: Path, calibrated: list[str]) -> None:
    made, inputs = SUBJECTS[name]
    model, plain = made(), made()
    keys = [list(vars(module)) for module in model.modules()]
    profile = memo.profile(model, inputs)
    assert [list(vars(module)) for module in model.modules()] == keys
    assert all(p.grad is None for p in model.parameters())
    save(profile, tmp_path / "profile.json")
    planned = memo.plan(load_profile(tmp_path / "profile.json"), **POLICIES[policy])
    save(planned, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == planned
    calibrated.clear()
    for plan in (tmp_path / "plan.json", str(tmp_path / "plan.json"), planned):
        memo.wrap(model, plan=plan)
        assert memo.wrap(model, plan=planned) is model
        for _ in range(2):
            assert_trains_as(model, plain, inputs)
            report = acted(model)
            assert report.totals.forecast == planned.forecast
            assert report.policy == planned.policy
            assert report.totals.peak_bytes == planned.forecast.peak_bytes
        memo.unwrap(model)
    assert calibrated == []


def test_profiling_leaves_training_as_it_was() -> None:
    models = [tower(), tower()]
    for model in models:
        model.drop = nn.Dropout(0.1)
        model.layers[0].mlp.append(nn.Dropout(0.3))
        model.layers[1].mlp.append(nn.BatchNorm1d(24).double())
    torch.manual_seed(5)
    memo.profile(models[0], signal())
    memo.wrap(models[0], policy="swap", keep_last=0)
    losses = []
    for model in models:
        torch.manual_seed(5)
        losses.append([model(signal()).square().mean().item() for _ in range(2)])
    assert losses[0] == losses[1]
    for got, want in zip(models[0].buffers(), models[1].buffers(), strict=True):
        assert torch.equal(got, want)


def test_a_wrapped_model_can_be_profiled() -> None:
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    before = memo.profile(model, signal())
    assert_trains_as(model, plain, signal())
    after = memo.profile(model, (signal(),))
    assert before.fingerprint == after.fingerprint == memo.profile(plain, signal()).fingerprint
    assert [block.groups for block in before.blocks] == [block.groups for block in after.blocks]
    assert_trains_as(model, plain, signal())
    acted(model)


def test_a_plan_for_another_length_runs_there() -> None:
    profile = memo.profile(tower(), signal(tokens=24))
    model = memo.wrap(tower(), plan=memo.plan(profile, seq_len=40, **POLICIES["memo"]))
    for _ in range(2):
        assert_trains_as(model, tower(), signal(tokens=40))
        assert acted(model).totals.peak_bytes == totals(model).forecast.peak_bytes


def test_the_length_that_a_refusal_suggests_is_a_length_of_the_plan_where_stacks_differ() -> None:
    model = FAMILIES["t5"].make()
    ids = torch.randint(1, 40, (1, 256), generator=torch.Generator().manual_seed(0))
    profile = memo.profile(model, {"input_ids": ids, "labels": ids[:, :128]})
    asked: dict[str, Any] = {"policy": "recompute", "keep_last": 1}
    whole = memo.plan(profile, **asked)
    assert memo.plan(profile, seq_len=256, **asked) == whole
    message = refused(PlanInfeasibleError, memo.plan, profile, budget=whole.forecast.peak_bytes - 1, **asked)
    found = re.search(r"([\d,]+) tokens instead of 256, shorter sequences in proportion", message)
    assert found, message
    longest = int(found[1])
    followed = memo.plan(profile, budget=whole.forecast.peak_bytes - 1, seq_len=longest, **asked)
    assert {block.tokens for block in followed.blocks} == {longest, longest // 2}


# Later shapes.


@pytest.mark.parametrize("policy", MAIN_POLICIES)
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_second_length_reuses_the_profile(name: str, policy: str, calibrated: list[str]) -> None:
    made, _ = SUBJECTS[name]
    model, plain = memo.wrap(made(), **POLICIES[policy]), made()
    for tokens in (24, 40, 17, 24, 40):
        inputs = signal(tokens=tokens) if name == "tower" else batch(tokens=tokens)
        assert_trains_as(model, plain, inputs)
        report = acted(model)
        assert report.totals.peak_bytes == report.totals.forecast.peak_bytes
        assert len(calibrated) == len(report.blocks)
    assert_nothing_held(model)


def test_a_new_batch_size_reuses_the_profile(calibrated: list[str]) -> None:
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    for rows, tokens in [(2, 24), (3, 24), (1, 24), (2, 24), (3, 24), (3, 31), (1, 40)]:
        assert_trains_as(model, plain, signal(rows=rows, tokens=tokens))
        assert len(calibrated) == 3
        acted(model)
    assert_nothing_held(model)


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_first_batch_too_short_to_slice_does_not_decide_for_longer_ones(first: int) -> None:
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    assert_trains_as(model, plain, signal(tokens=first))
    assert_trains_as(model, plain, signal(tokens=24))
    report = acted(model)
    assert [block.reason for block in report.blocks] == ["", "", ""]
    assert report.totals.peak_bytes == report.totals.forecast.peak_bytes
    assert_trains_as(model, plain, signal(tokens=first))
    assert_nothing_held(model)


def test_other_arguments_of_the_model_are_profiled_anew(calibrated: list[str]) -> None:
    model, plain = memo.wrap(llama(), **POLICIES["memo"]), llama()
    inputs = batch(tokens=24)
    for given in (inputs, {k: v for k, v in inputs.items() if k != "attention_mask"}, inputs):
        assert_trains_as(model, plain, given)
        acted(model)
    assert len(calibrated) == 4


# memo.check.


@pytest.mark.parametrize("policy", MAIN_POLICIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SUBJECTS)
def test_check_in_full_precision(name: str, dtype: torch.dtype, policy: str) -> None:
    model = tower(dtype=dtype) if name == "tower" else make("llama", dtype=dtype)
    inputs = signal(dtype=dtype) if name == "tower" else batch(tokens=24)
    result = memo.check(model, inputs, **POLICIES[policy])
    assert result.bound == {torch.float64: BOUND, torch.float32: 1e-5}[dtype]
    assert result.ok, result
    assert result.gradient_error <= result.bound
    assert result.report.totals.bytes_to_host > 0
    assert (result.report.totals.recomputed_flops > 0) == (policy != "swap")
    if name == "tower":
        assert result.bit_identical or policy != "swap"
        assert result.loss_difference == 0


@pytest.mark.parametrize("name", SUBJECTS)
def test_check_in_half_precision(name: str) -> None:
    model = tower(dtype=torch.bfloat16) if name == "tower" else make("llama", dtype=torch.bfloat16)
    inputs = signal(dtype=torch.bfloat16) if name == "tower" else batch(tokens=24)
    result = memo.check(model, inputs, **POLICIES["memo"])
    assert result.ok, result
    assert result.bound == 1.1
    assert "times the unwrapped model's, against float64" in str(result)
    assert result.report.totals.recomputed_flops > 0


def test_check_leaves_the_model_and_its_wrap_alone() -> None:
    model, plain = memo.wrap(tower(), **POLICIES["swap"]), tower()
    step(model, signal())
    before = memo.report(model)
    state = torch.random.get_rng_state()
    assert memo.check(model, signal(), **POLICIES["recompute"]).ok
    assert torch.equal(torch.random.get_rng_state(), state)
    assert memo.report(model) == before
    assert all(p.grad is None for p in model.parameters())
    assert_trains_as(model, plain, signal())


#: A global of the program, which a rerun cannot put back as it puts back what belongs to the block.
_SCALE = [1.0]


class _Scaled(nn.Module):
    """Reads a global that its model changes when its forward ends."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (self.linear(x) * _SCALE[0]).sin()


def _scaled(afterwards: float) -> nn.Module:
    model = tower(2)
    model.layers = nn.ModuleList(_Scaled() for _ in range(2)).double()
    model.register_forward_pre_hook(lambda *_: _SCALE.__setitem__(0, 1.0))
    model.register_forward_hook(lambda *_: _SCALE.__setitem__(0, afterwards))
    return model


def test_check_sees_a_block_that_cannot_be_run_again() -> None:
    """Too small a difference for the values that a rerun is compared with, but not for a float64 gradient."""
    model = _scaled(1 + 3e-10)
    assert memo.check(model, signal(), policy="swap").ok  # nothing is run again
    wrong = memo.check(model, signal(), policy="recompute")
    assert not wrong.ok
    assert wrong.worst_error > wrong.bound
    assert wrong.worst_parameter.startswith(("first", "layers"))
    assert str(wrong).startswith("check: NOT exact, the bound is 1e-12\nexercised: ")


def test_a_global_that_changed_since_the_forward_is_an_error() -> None:
    model = _scaled(2.0)
    assert memo.check(model, signal(), policy="swap").ok
    with pytest.raises(ReplayMismatchError, match=r"something that it reads changed since"):
        memo.check(model, signal(), policy="recompute")


class _Counting(nn.Module):
    """Counts its calls, in an attribute that a rerun puts back."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + (self.linear(x) * self.calls).sin()


def test_check_of_a_block_that_counts_its_calls() -> None:
    model = tower(2)
    model.layers = nn.ModuleList(_Counting() for _ in range(2)).double()
    assert memo.check(model, signal(), policy="recompute").ok
    assert [layer.calls for layer in model.layers] == [0, 0]


def test_plans_are_readable_and_json_is_json(tmp_path: Path) -> None:
    planned = memo.plan(memo.profile(tower(), signal()), **POLICIES["memo"])
    assert "layers.0" in str(planned)
    save(planned, tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["memo_runtime"] == "plan"
