"""``memo plan``: names, files and factories in; a table and a plan out; one message for every mistake."""

import itertools
import json
import re

import pytest
from typer.testing import CliRunner

from memo_runtime.cli.app import app
from memo_runtime.persist import load_plan
from memo_solver import Problem, Request, validate

CONFIG = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
}  # fmt: skip
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
    assert torch.empty(1).device.type == "meta"
    return nn.Sequential(*(Block() for _ in range(4))), torch.randn(2, 96, 16)

class Scores(Block):
    def forward(self, x):
        return super().forward(x + torch.softmax(x @ x.transpose(1, 2), -1) @ x)

def scores():
    return nn.Sequential(*(Scores() for _ in range(2))), torch.randn(2, 96, 16)

class Scan(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Conv1d(16, 16, 4, padding=3, groups=16), nn.Linear(16, 16)
    def forward(self, x):
        return x + self.out(self.mix(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))

def scan():
    return nn.Sequential(*(Scan() for _ in range(2))), torch.randn(2, 96, 16)

def broken():
    raise KeyError("weights.bin")

def leaves():
    raise SystemExit(3)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "odd.json").write_text(json.dumps({**CONFIG, "hidden_size": "wide"}))
    (tmp_path / "stored.json").write_text(json.dumps({**CONFIG, "torch_dtype": "float32"}))
    (tmp_path / "heads.json").write_text(json.dumps({**CONFIG, "num_attention_heads": 4, "num_key_value_heads": 3}))
    (tmp_path / "misspelled.json").write_text(json.dumps({**CONFIG, "model_type": "llamma"}))
    (tmp_path / "offlinemodel.py").write_text(FACTORY)
    return tmp_path


def memo(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def said(result):
    """What was printed, with lines joined."""
    return " ".join(result.stdout.split())


def assert_nothing_overlaps(rows):
    requests = tuple(Request(row["id"], row["lower"], row["upper"], row["size"]) for row in rows)
    validate(Problem(requests=requests), [row["offset"] for row in rows])


def test_a_config_becomes_a_plan(folder):
    pytest.importorskip("transformers")
    result = memo(
        "--model", "config.json", "--seq-len", "64K", "--gpus", "2", "--host-memory", "1TB", "-o", "plan.json"
    )
    assert result.exit_code == 0, result.output
    assert "one of 2 for 65,536 tokens" in result.stdout
    assert "MFU" in result.stdout
    assert "Ulysses" in result.stdout
    assert "described by its peak in bf16" not in said(result)
    plan = load_plan(folder / "plan.json")
    written = json.loads((folder / "plan.json").read_text())
    assert (written["seq_len"], written["gpus"]) == (65536, 2) == (plan.seq_len, plan.gpus)
    assert {block.tokens for block in plan.blocks} == {32768}
    assert written["forecast"]["peak_bytes"] > plan.profile.states.parameters
    assert 0 < written["forecast"]["mfu"] < 1
    assert written["forecast"]["collective_bytes"] > 0
    rows = written["placement"]
    assert set(rows[0]) == {"id", "lower", "upper", "size", "offset"}
    assert len({row["id"] for row in rows}) == len(rows) > 100
    assert_nothing_overlaps(rows)
    arena = max(row["offset"] + row["size"] for row in rows)
    # What is placed, with weights and optimizer states, is about the forecast's peak.
    states = plan.profile.allocated_bytes + plan.profile.states.optimizer
    assert arena + states == pytest.approx(written["forecast"]["peak_bytes"], rel=0.1)
    assert plan.profile.fingerprint.device == "offline:NVIDIA H100 80GB HBM3"


def test_a_config_of_another_dtype_is_planned_in_bfloat16_and_the_plan_says_so(folder):
    pytest.importorskip("transformers")
    result = memo("--model", "stored.json", "--seq-len", "8K")
    assert result.exit_code == 0, result.output
    assert "planned in bfloat16, and the config says float32" in said(result)


def test_a_factory_is_called_on_meta(folder):
    result = memo("--model", "offlinemodel:make", "--seq-len", "8K", "--policy", "recompute", "--gpu", "rtx-4090")
    assert result.exit_code == 0, result.output
    assert "8,192 tokens on NVIDIA GeForce RTX 4090" in result.stdout
    # What nobody asked for in bf16 is not told in bf16 without a word.
    assert "weights are float32, and rtx-4090 is described by its peak in bf16" in said(result)


@pytest.mark.parametrize("asked", ["1M", "1000000M"])
def test_what_cannot_fit_exits_with_3_and_says_what_would(folder, asked):
    result = memo("--model", "offlinemodel:make", "--seq-len", asked, "--budget", "100MiB")
    assert result.exit_code == 3
    for said in ("does not fit in 100.00 MiB", "floor", "would fit  --seq-len", f" instead of {int(asked[:-1]) << 20}"):
        assert said in result.output
    # Tiles are of what was tried, so that no longer length fits by them.
    assert "replay alone" not in result.output
    longest = int(re.search(r"--seq-len (\d+) instead", result.output)[1])
    for tokens, code in ((longest, 0), (longest + 128, 3)):
        more = memo("--model", "offlinemodel:make", "--seq-len", str(tokens), "--budget", "100MiB")
        assert more.exit_code == code, more.output


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [
        ({"--seq-len": "1M", "--budget": "100MiB"}, "does not fit in 100.00 MiB"),
        ({"--seq-len": "64K", "--policy": "recompute", "--host-memory": "1MiB"}, "host memory with policy"),
    ],
)
def test_what_would_fit_is_put_as_options_that_fit(folder, asked, refusal):
    def plan(options):
        return memo("--model", "offlinemodel:make", "--gpus", "2", *itertools.chain.from_iterable(options.items()))

    refused = plan(asked)
    assert refused.exit_code == 3
    assert refusal in refused.output
    assert "each of 2 GPUs; --seq-len and --host-memory are of all together" in refused.output
    lines = refused.output.split("would fit")[1].split("  of  ")[0].strip().splitlines()
    found = [dict(re.findall(r"(--[a-z-]+) (\S+)", line.split("(device")[0])) for line in lines]
    assert all(found)
    for options in found:
        result = plan({**asked, **options})
        assert result.exit_code == 0, (options, result.output)


def test_an_option_that_another_policy_does_not_take_is_said_with_it(folder):
    asked = ["--model", "offlinemodel:make", "--seq-len", "64K", "--keep-last", "0", "--budget", "220MiB"]
    refused = memo(*asked, "--policy", "memo", "--alpha", "1")
    assert refused.exit_code == 3
    assert "--policy recompute without --alpha (device" in refused.output
    assert memo(*asked, "--policy", "recompute").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "lama-8b", "--seq-len", "1M"], "did you mean llama-8b"),
        (["--model", "config.json", "--seq-len", "1M", "--gpu", "h10"], "did you mean h100-80gb"),
        (["--model", "config.json", "--seq-len", "many"], "is not a token count"),
        (["--model", "config.json", "--seq-len", "1K", "--gpus", "0"], "--gpus 0"),
        (["--model", "config.json", "--seq-len", "1K", "--gpus", "1000"], "of one node: give 1 to 72"),
        (["--model", "", "--seq-len", "1K"], "model '' is unknown"),
        (["--model", "meta-llama/Llama-3.1-8B", "--seq-len", "1K"], "of a model of the Hub, save that file"),
        (["--model", "config.json", "--seq-len", "1K", "--policy", "swop"], "did you mean 'swap'"),
        (["--model", "config.json", "--seq-len", "1K", "--host-memory", "2XB"], "--host-memory='2XB'"),
        (["--model", "config.json", "--seq-len", "1K", "--budget", "70"], "did you mean --budget='70GiB'?"),
        (["--model", ".", "--seq-len", "1K", "--gpu", "v100"], "there are a800-80gb"),
        (["--model", "/", "--seq-len", "1K"], "cannot read /config.json"),
        (["--model", "config.json", "--seq-len", "1K", "--budget", "1TiB"], "1.00 TiB is more than the 79.18 GiB of"),
        (["--model", "offlinemodel:scores", "--seq-len", "4K", "--gpus", "2"], "plan it with --gpus 1"),
        (["--model", "offlinemodel:scan", "--seq-len", "4K", "--gpus", "2"], "mixes tokens by aten.convolution"),
        (["--model", "offlinemodel:broken", "--seq-len", "1K"], "KeyError: 'weights.bin'"),
        (["--model", "offlinemodel:maek", "--seq-len", "1K"], "did you mean make?"),
        (["--model", "offlinemodel:leaves", "--seq-len", "1K"], "was called and raised SystemExit: 3"),
        (["--model", "config.json", "--seq-len", "1K", "-o", "none/plan.json"], "there is no folder none"),
        (["--model", "config.json", "--seq-len", "1001", "--gpus", "2"], "1,000 and 1,002 do"),
        (["--model", "config.json"], "--seq-len"),
        (["--model", "odd.json", "--seq-len", "1K"], "can be made of odd.json"),
        (["--model", "misspelled.json", "--seq-len", "1K"], "did you mean llama"),
        (["--model", "misspelled.json", "--seq-len", "1K"], "are given as module:factory"),
        (["--model", "heads.json", "--seq-len", "1K"], "does not run on this machine's processor"),
    ],
)
def test_mistakes_are_one_message(folder, arguments, said):
    result = memo(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("verb", ["plan", "fit"])
def test_a_rank_that_is_none_is_refused_before_the_model_is_made(verb):
    """No file has this name, which making the model would say."""
    length = ["--seq-len", "4096"] if verb == "plan" else []
    result = CliRunner().invoke(app, [verb, "--model", "no-such.json", "--gpu", "h100-80gb", "--lora", "0", *length])
    assert result.exit_code != 0
    assert "--lora 0 is not a rank" in " ".join((result.output + str(result.exception or "")).split())
