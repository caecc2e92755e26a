"""The whole example: it trains, compares, saves plans, stops on Ctrl-C, and refuses with a reason."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

import train_text
from geometries import find_geometry, make_config
from train_options import parse_options
from train_setup import prepare
from train_text import main

from tests.examples.conftest import EXAMPLES

SHORT = ["--device", "cpu", "--layers", "3", "--seq-len", "96", "--steps", "2"]
FIELDS = {
    "losses",
    "max_rel_loss_diff",
    "bytes_to_host",
    "recomputed_flops",
    "seq_len",
    "steps",
    "peak_bytes",
    "host_bytes",
    "budget",
    "host_budget",
    "step_seconds",
    "tokens_per_second",
    "mfu",
    "forecast",
    "geometry",
    "policy",
    "device",
    "torch",
    "seconds",
    "peak_reserved",
    "host_rss",
}


def start(*arguments):
    """The example as its users start it, with Ctrl-C switched on whatever started the tests."""
    # A new process inherits that a signal is ignored, and nothing else of how signals are handled.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, str(EXAMPLES / "train_text.py"), "--device", "cpu", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    finally:
        signal.signal(signal.SIGINT, before)


def result_of(capsys, *arguments, code=0):
    """The JSON line and the talk of a run in this process."""
    assert main([*SHORT, *arguments]) == code
    out, err = capsys.readouterr()
    return (json.loads(out) if out else None), err


def test_the_demo(tmp_path):
    path = tmp_path / "result.json"
    process = start("--compare", "--steps", "10", "--json-out", str(path))
    out, err = process.communicate()
    assert process.returncode == 0, err
    (line,) = out.splitlines()
    result = json.loads(line)
    assert set(result) == FIELDS
    assert len(result["losses"]) == result["steps"] == 10
    assert result["losses"][-1] < 0.8 * result["losses"][0]
    assert result["max_rel_loss_diff"] <= 1e-6
    assert result["bytes_to_host"] > 0
    assert result["recomputed_flops"] > 0
    assert result["forecast"]["peak_bytes"] == result["peak_bytes"]
    assert path.read_text() == out
    assert "largest relative loss difference to the unwrapped model: " in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--geometry", "qwen3-tiny", "--policy", "recompute", "--keep-last", "0", "--attention", "eager"),
        ("--batch-size", "2", "--accumulate", "2", "--policy", "swap", "--keep-last", "0"),
        ("--sdpa-backend", "math", "--dtype", "float64"),
        ("--documents", "packed", "--batch-size", "2"),
    ],
    ids=["qwen3 eager", "accumulation", "float64 math", "packed"],
)
def test_other_ways_to_train(capsys, arguments):
    result, _ = result_of(capsys, "--compare", *arguments)
    assert result["max_rel_loss_diff"] <= 1e-6
    assert result["bytes_to_host"] > 0


def test_a_saved_plan_runs_again_and_only_for_its_model(capsys, tmp_path):
    plan = str(tmp_path / "plan.json")
    made, _ = result_of(capsys, "--save-plan", plan, "--keep-last", "0")
    again, _ = result_of(capsys, "--plan", plan)
    for name in ("losses", "bytes_to_host", "recomputed_flops", "policy"):
        assert made[name] == again[name]
    assert made["bytes_to_host"] > 0
    result, err = result_of(capsys, "--plan", plan, "--geometry", "qwen3-tiny", code=5)
    assert result is None
    assert "error: " in err


def test_ctrl_c_ends_the_process_with_what_was_done():
    process = start("--layers", "2", "--seq-len", "64", "--steps", "5000")
    for line in process.stderr:
        if line.split()[:1] == ["2"]:  # the line of the second step
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    result = json.loads(out)
    assert 2 <= result["steps"] < 5000
    assert len(result["losses"]) == result["steps"]
    assert f"interrupted after {result['steps']} of 5000 steps" in err
    assert "Traceback" not in err


class Interrupting:
    """Makes models that send Ctrl-C to the process the ``at``-th time a gradient or an output is made."""

    def __init__(self, *, backward, at):
        self._backward = backward
        self._left = at
        self._make = train_text.build_model

    def __call__(self, *arguments, **settings):
        model = self._make(*arguments, **settings)
        layer = model.model.layers[1]
        if self._backward:
            layer.mlp.down_proj.weight.register_hook(self._count)
        else:
            layer.mlp.register_forward_hook(self._count)
        return model

    def _count(self, *_):
        self._left -= 1
        if self._left == 0:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 12])
def test_ctrl_c_in_the_middle_of_a_step(capsys, monkeypatch, backward, at):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(train_text, "build_model", Interrupting(backward=backward, at=at))
    try:
        result, err = result_of(capsys, "--steps", "60", "--keep-last", "0", code=130)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result["steps"] > 0) == (at > 1)
    assert result["steps"] < 60
    assert len(result["losses"]) == result["steps"]
    assert f"interrupted after {result['steps']} of 60 steps" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--policy", "swap", "--alpha", "0.5"], 2, "alpha=0.5 goes with policy"),
        (["--text", "no/such/text"], 2, "no/such/text cannot be read: No such file"),
        (["--text", __file__, "--seq-len", "1M"], 2, "and one sequence needs 1,048,576"),
        (["--text", __file__, "--documents", "packed"], 2, "a --text file is one document"),
        (["--tokenizer", "no/such/folder"], 2, "no such folder"),
        (["--geometry", "llama-9b"], 2, "give a config.json or one of tiny, "),
        (
            ["--json-out", "no/such/folder/out.json"],
            2,
            "--json-out no/such/folder/out.json cannot be written",
        ),
        (
            ["--save-plan", "no/such/folder/out.json"],
            2,
            "--save-plan no/such/folder/out.json cannot be written",
        ),
        (["--plan", "no/such/plan"], 2, "no/such/plan"),
        (["--plan", __file__], 2, "is not JSON"),
        (["--sdpa-backend", "cudnn"], 2, "--sdpa-backend cudnn needs CUDA"),
        (["--policy", "swap", "--keep-last", "0", "--host-budget", "1KiB"], 3, "host"),
        (["--budget", "1MiB"], 3, "does not fit"),
    ],
    ids=lambda value: " ".join(value[:2]).split("/tests/")[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_done_says_why(capsys, arguments, code, message):
    result, err = result_of(capsys, *arguments, code=code)
    assert result is None
    assert message in err
    assert err.count("error: ") == 1
    assert "Traceback" not in err


def test_positions_of_a_config_are_extended_only_if_asked(capsys, tmp_path):
    make_config(find_geometry("tiny"), tokens=64).save_pretrained(tmp_path)
    arguments = ("--geometry", str(tmp_path), "--seq-len", "1100", "--steps", "1", "--policy", "none")
    _, err = result_of(capsys, *arguments, code=2)
    assert "has positions for 1,024 tokens and --seq-len asks for 1,100: give --extend-positions" in err
    result, _ = result_of(capsys, *arguments, "--extend-positions")
    assert result["seq_len"] == 1100


def test_documents_that_are_packed_count_their_own_pairs_alone():
    setup = prepare(parse_options(["--documents", "packed", "--seq-len", "4K", "--batch-size", "2"]))
    lengths = setup.documents()
    assert sum(lengths) == 2 * 4096
    assert len(lengths) > 2
    batch = setup.batch(0)
    assert (batch["labels"] == -100).sum() == (batch["position_ids"] == 0).sum() == len(lengths)


def test_policy_none_runs_without_a_plan(capsys):
    result, _ = result_of(capsys, "--policy", "none", "--compare")
    assert (result["policy"], result["bytes_to_host"], result["recomputed_flops"]) == ("none", 0, 0)
    assert result["forecast"] is None
    assert result["max_rel_loss_diff"] <= 1e-6


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB"), 1, "out of memory; lower --seq-len"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory; lower --seq-len"),
        (RuntimeError("No available kernel. Aborting"), 2, "--sdpa-backend flash cannot take this dtype"),
    ],
)
def test_what_torch_says(capsys, monkeypatch, error, code, message):
    def build_model(*_, **__):
        raise error

    monkeypatch.setattr(train_text, "build_model", build_model)
    _, err = result_of(capsys, "--sdpa-backend", "flash", code=code)
    assert f"error: {message}" in err


def test_other_errors_of_torch_are_raised(monkeypatch):
    def build_model(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(train_text, "build_model", build_model)
    with pytest.raises(RuntimeError, match="a bug"):
        main(SHORT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_no_cuda(capsys):
    result, err = result_of(capsys, "--device", "cuda", code=2)
    assert result is None
    assert "error: --device cuda: there is no CUDA here" in err


def test_a_vocabulary_that_is_too_small(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "vocab_size": 128, "hidden_size": 64}))
    _, err = result_of(capsys, "--geometry", str(path), code=2)
    assert "the geometry's vocabulary is 128" in err


def test_the_unwrapped_model_may_not_fit(capsys, monkeypatch):
    make, made = train_text.build_model, []

    def build_model(*arguments, **settings):
        if made:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. More advice")
        made.append(1)
        return make(*arguments, **settings)

    monkeypatch.setattr(train_text, "build_model", build_model)
    result, err = result_of(capsys, "--compare", code=3)
    assert result["steps"] == 2
    assert result["max_rel_loss_diff"] is None
    assert "nothing to compare with, the unwrapped model does not fit: CUDA out of memory;" in err
