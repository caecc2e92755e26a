import json

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


def test_a_factory_of_something_else_is_refused(factory):
    result = check("--model", f"{factory}:wrong")
    assert result.exit_code == 2
    assert "returned int; it has to return (model, batch)" in " ".join(result.output.split())


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
