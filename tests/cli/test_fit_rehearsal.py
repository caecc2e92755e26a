"""``memo fit --rehearse``: the longest length, confirmed by whole steps of a real model on the machine that is here."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from memo_runtime.cli import fit_rehearsal
from memo_runtime.cli.app import app
from memo_runtime.cli.fit_rehearsal import Here, rehearse_apart, told_of
from memo_runtime.cli.rehearsal_process import RehearsalProcess
from memo_runtime.cli.rehearsal_trial import Trial, run
from memo_runtime.errors import RehearsalError
from memo_runtime.rehearsal.nearby import Nearby, OutOfTimeError, longest_near

pytest.importorskip("transformers")
TINY = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def trial(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return Trial(
        model=str(path), tokens=384, device="cpu", policy="recompute", alpha=None, keep_last=0, budget=1 << 30,
        host_budget=1 << 20, optimizer="adamw", lora=4,
    )  # fmt: skip


def test_a_trial_is_a_whole_step_of_a_real_model(trial):
    found = run(trial)
    assert found.fits
    assert (found.replaced[0].forward, found.replaced[0].backward) == (2, 2)
    assert found.host_bytes == found.forecast.host_bytes > 0
    assert not found.notes


def test_a_trial_without_a_policy_has_no_limits(trial):
    assert run(replace(trial, policy="none", keep_last=None, host_budget=1024)).fits


@pytest.mark.slow
def test_a_trial_that_does_not_fit_is_told(trial):
    found = run(replace(trial, host_budget=40_000, lora=None, optimizer="sgd"))
    assert (found.fits, found.phase) == (False, "plan")
    assert "HostLimitError" in found.error
    text = told_of(longest_near(384, 128, lambda tokens: found), 512, Here(device="cpu", name="the CPU")).text
    assert "rehearsed on the CPU, 3 lengths:\n  no length fits, down to 128 tokens" in text


def test_what_a_cpu_would_take_hours_for_is_refused(trial, monkeypatch):
    monkeypatch.setattr(fit_rehearsal.Here, "found", lambda: Here(device="cpu", name="the CPU"))
    monkeypatch.setattr(fit_rehearsal, "rehearse_apart", lambda trial: pytest.fail("it was rehearsed"))
    monkeypatch.setattr(fit_rehearsal, "_PATIENCE", 1e-6)
    command = ["fit", "--model", trial.model, "--policy", "recompute", "--host-memory", "1MiB", "--rehearse"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert "or more on this CPU: rehearse where a GPU is" in result.output


@pytest.mark.slow
def test_the_longest_of_a_forecast_is_confirmed(trial):
    command = ["fit", "--model", trial.model, "--policy", "recompute", "--host-memory", "1MiB", "--rehearse", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    shown = told["rehearsed"]
    assert shown["device"] == "the CPU"
    assert shown["longest"] == pytest.approx(told["longest"], rel=0.05)
    assert shown["rehearsal"]["fits"]
    assert shown["too_long"] > shown["longest"]
    assert shown["short"]["phase"] == "plan"
    with pytest.raises(RehearsalError, match="384 tokens could not be rehearsed: model 'nonsense' is unknown"):
        rehearse_apart(replace(trial, model="nonsense"))


def test_one_process_rehearses_many_lengths_and_is_told_what_it_does(trial):
    said = []
    with RehearsalProcess(progress=said.append) as process:
        assert process.plan(trial) is None
        first = process._process.pid
        assert process.rehearse(trial).fits
        assert process.rehearse(replace(trial, tokens=300)).fits
        assert sum("blocks profiled in" in line for line in said) == 1, "the model is profiled once"
        refused = process.plan(replace(trial, tokens=1 << 14))
        assert (refused.fits, refused.phase, refused.where) == (False, "plan", "none fits")
        assert process._process.pid == first, "nothing was begun"
        assert [line for line in said if line.startswith("rehearsal: a step took")]
        os.kill(first, signal.SIGKILL)
        killed = process.rehearse(trial)
        assert (killed.fits, killed.phase) == (False, "host")
        assert "killed by signal 9" in killed.error
        assert process._process is None, "the next one is fresh"


def test_time_that_is_over_ends_what_is_under_way(trial):
    with RehearsalProcess(deadline=time.monotonic() + 0.5) as process:
        with pytest.raises(OutOfTimeError):
            process.rehearse(trial)
        assert process._process is None


def test_a_search_that_is_cut_says_so(trial):
    command = [
        "fit", "--model", trial.model, "--policy", "recompute", "--host-memory", "1MiB", "--rehearse",
        "--minutes", "0.001", "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 4, result.output
    shown = json.loads(result.stdout)["rehearsed"]
    assert (shown["longest"], shown["lengths"], shown["cut"]) == (0, 0, True)
    found = Nearby(planned=2, planned_at=640, cut=True)
    assert told_of(found, 512, Here(device="cpu", name="the CPU")).text == (
        "\n\nrehearsed on the CPU, 0 lengths, 2 more by their plans alone:\n"
        "  no length was confirmed in the time that --minutes gives\n"
        "  cut: the time of --minutes was over before the search was: 640 tokens have a plan"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--minutes", "5"), "give both, or none"),
        (("--rehearse", "--minutes", "0"), "is no time"),
        (("--rehearse", "--minutes", "inf"), "10,080 (a week) at most"),
    ],
)
def test_a_time_that_is_none_is_refused(given, said):
    result = CliRunner().invoke(app, ["fit", "--model", "llama-1b", *given])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--gpus", "2"), "--rehearse runs on one GPU, and --gpus is 2"),
        (("--optimizer", "adamw-8bit"), "--rehearse takes the optimizers of PyTorch, and adamw-8bit is none"),
        (("--model", "package.module:make"), "cannot make the batch of package.module:make longer"),
        ((), "79.18 GiB are asked for, and a smaller GPU here has 40.00 GiB"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused_at_once(monkeypatch, given, said):
    smaller = Here(device="cuda", name="a smaller GPU", memory_bytes=40 << 30)
    monkeypatch.setattr(fit_rehearsal.Here, "found", lambda: smaller)
    result = CliRunner().invoke(app, ["fit", "--model", "llama-1b", "--rehearse", *given])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
