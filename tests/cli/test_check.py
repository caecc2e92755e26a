import json
import re

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from memo_runtime.cli.app import app

FACTORY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))

def make():
    return nn.Sequential(*(Block() for _ in range(4))), torch.randn(2, 96, 16)

def wrong():
    return 7

def reversed():
    model, batch = make()
    return batch, model

def three():
    return (*make(), 1)

def with_a_parameter(width):
    return make()

def broken():
    raise KeyError("weights.bin")

def wrong_batch():
    return make()[0], torch.randn(2, 96, 17)

def wrong_names():
    return make()[0], {"hidden": torch.randn(2, 96, 16)}

def without_a_gradient():
    return make()[0].requires_grad_(False), torch.randn(2, 96, 16)

def without_blocks():
    return nn.Linear(16, 16), torch.randn(2, 16)

def meta():
    with torch.device("meta"):
        return make()[0], torch.randn(2, 96, 16, device="cpu")

class Namespace:
    make = staticmethod(make)

NUMBER = 5
"""


def check(*arguments):
    return CliRunner().invoke(app, ["check", *arguments])


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "my_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_factory"


def test_a_tiny_llama_is_exact():
    result = check("--model", "llama", "--policy", "memo", "--alpha", "0.5", "--seq-len", "128")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("check: exact")
    assert "model.layers.0-3  replay" in result.stdout


def test_pure_swap_of_anyones_model_is_bit_identical(factory):
    result = check("--model", f"{factory}:make", "--policy", "swap", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ok"]
    assert found["bit_identical"]
    assert found["report"]["totals"]["bytes_to_host"] > 0


def test_a_model_in_float64(factory):
    arguments = ("--model", f"{factory}:make", "--policy", "memo", "--alpha", "0.37", "--dtype", "float64")
    result = check(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["gradient_error"] <= 1e-12


def test_an_inexact_model_exits_with_one(factory, monkeypatch):
    from memo_runtime import checking

    monkeypatch.setitem(checking.BOUNDS, torch.float32, -1.0)
    result = check("--model", f"{factory}:make", "--policy", "recompute")
    assert result.exit_code == 1
    assert result.stdout.startswith("check: NOT exact")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "nope"), "'nope' is unknown; there are llama, qwen3, gpt2"),
        (("--model", "no_such_module:make"), "cannot import 'no_such_module:make'"),
        (("--model", "torch:no_such_name"), "cannot import"),
        (("--policy", "magic"), "policy='magic' is unknown"),
        (("--alpha", "0.5", "--policy", "swap"), "alpha=0.5 goes with policy"),
        (("--alpha", "2", "--policy", "memo"), "not a fraction"),
        (("--budget", "lots"), "'lots' is not a size"),
        (("--host-memory", "70"), "--host-memory '70' would be 70 bytes"),
        (("--policy", "none", "--host-memory", "1GiB"), "so --host-memory 1.00 GiB would not be kept to: leave --host"),
        (("--seq-len", "many"), "'many' is not a token count"),
        (("--dtype", "int8"), "'int8' is unknown"),
        (("--device", "abacus"), "'abacus' is no device"),
        (("--device", "meta"), "'meta' is not supported"),
    ],
)
def test_bad_input_says_what_would_work(arguments, says):
    result = check(*arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())


#: What a name leads to, and what is said about it.
FACTORIES = {
    "wrong": "returned int; it has to return (model, batch)",
    "reversed": "returned (Tensor, Sequential); it has to return (model, batch)",
    "three": "returned (Sequential, Tensor, int); it has to return (model, batch)",
    "with_a_parameter": "was called and raised TypeError: with_a_parameter() missing 1 required positional argument",
    "broken": "was called and raised KeyError: 'weights.bin'",
    "NUMBER": "is int, not a function: a function without parameters that returns (model, batch)",
    "nothing": "cannot import",
    "": "is not module:factory, such as mypackage.mymodel:make",
    "wrong_batch": "Sequential does not train on this batch, without memo too ([0]: float32 [2, 96, 17] on cpu): "
    "RuntimeError: mat1 and mat2 shapes cannot be multiplied (192x17 and 16x64)",
    "wrong_names": "TypeError: Sequential.forward() got an unexpected keyword argument 'hidden'",
    "without_a_gradient": "no tensor with a gradient",
    "without_blocks": "no repeated block found in Linear",
    "meta": "parameters of Sequential are on the meta device",
}


@pytest.mark.parametrize("name", FACTORIES)
def test_a_factory_that_does_not_do_is_one_message(factory, name):
    result = check("--model", f"{factory}:{name}")
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)  # a traceback would be the exception itself
    # Typer draws a box around usage errors.
    said = " ".join(result.output.replace("\u2502", " ").split())
    assert FACTORIES[name] in said
    assert result.stdout == ""


def test_a_factory_that_raises_is_located(factory, tmp_path):
    said = check("--model", f"{factory}:broken").output.replace("\u2502", " ").replace("\n", " ")
    line = FACTORY.splitlines().index('    raise KeyError("weights.bin")') + 1
    assert f"my_factory.py, line {line})" in " ".join(said.split())


@pytest.mark.parametrize("name", ["torch.nn:Linear", "torch:__version__", "torch.nn.functional:relu"])
def test_things_that_are_no_factories(name):
    result = check("--model", name)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert "function without parameters" in " ".join(result.output.replace("\u2502", " ").split())


def test_a_module_that_does_not_import(tmp_path, monkeypatch):
    (tmp_path / "broken_factory.py").write_text("import torch\nraise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = check("--model", "broken_factory:make")
    assert result.exit_code == 2
    said = " ".join(result.output.replace("\u2502", " ").split())
    assert "cannot import 'broken_factory:make': RuntimeError: no licence" in said
    assert "line 2)" in said


def test_a_factory_inside_a_class(factory):
    assert check("--model", f"{factory}:Namespace.make").exit_code == 0


# What was exercised.


def test_without_a_policy_both_a_swap_and_a_rerun_are_checked(factory):
    result = check("--model", f"{factory}:make")
    assert result.exit_code == 0, result.output
    assert re.search(r"^exercised: [\d.]+ KiB to the host and back, [\d.]+ FLOP computed again$", result.stdout, re.M)
    found = json.loads(check("--model", f"{factory}:make", "--json").stdout)["report"]
    assert found["policy"] == "memo"
    assert {block["alpha"] for block in found["blocks"]} == {0.5}
    found = json.loads(check("--model", f"{factory}:make", "--alpha", "0.25", "--json").stdout)["report"]
    assert {block["alpha"] for block in found["blocks"]} == {0.25}


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("none", "exercised: nothing was moved to the host or run again; policy memo does both"),
        ("swap", "0 FLOP computed again; policy memo runs blocks again too"),
    ],
)
def test_what_was_not_exercised_is_said(factory, policy, says):
    result = check("--model", f"{factory}:make", "--policy", policy)
    assert result.exit_code == 0
    assert says in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no CUDA device")
def test_cuda_where_there_is_none():
    result = check("--device", "cuda")
    assert result.exit_code == 2
    assert "there is no CUDA device" in result.output


def test_a_host_limit_that_nothing_fits_is_infeasible(factory):
    result = check("--model", f"{factory}:make", "--policy", "swap", "--host-memory", "1KiB")
    assert result.exit_code == 3
    assert "Traceback" not in result.output


def test_place_moves_numbers_and_keeps_whole_ones():
    from memo_runtime.cli.placing import place

    batch = {"ids": torch.ones(2, dtype=torch.int64), "mask": torch.ones(2), "name": "x"}
    model, moved = place(nn.Linear(2, 2), batch, torch.device("cpu"), torch.float64)
    assert model.weight.dtype == moved["mask"].dtype == torch.float64
    assert moved["ids"].dtype == torch.int64
    assert moved["name"] == "x"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_tiny_models_are_small_and_give_a_loss(name):
    pytest.importorskip("transformers")
    from memo_runtime.cli.models import TINY, make_model

    model, batch = make_model(name, sequences=3, tokens=8)
    assert name in TINY
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert batch["input_ids"].shape == (3, 8)
    assert torch.isfinite(model(**batch).loss)
