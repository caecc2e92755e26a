"""The check of a block at a length at which nothing fits whole passes what is right, and sees what is not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import sampled_rows
from benchmarks.chunked_reference import Head, Reference, rounded_attention
from memo_runtime.execution import tiled_mixing
from memo_runtime.execution.mixers import attention

#: A wrong kernel is right at lengths of the check that every capture passes first.
CHECKED = 64
FORWARD, BACKWARD = attention._FORWARD["cpu"], attention._BACKWARD["cpu"]
OPTIONS = ["--commit", "none", "--geometry", "tiny", "--device", "cpu", "--tile", "128", "--short", "64"]


def found(tokens=300, dtype="float64", groups=2, **more):
    options = [f"--{name}={value}" for name, value in more.items()]
    given = [*OPTIONS, f"--length={tokens}", f"--dtype={dtype}", f"--groups={groups}", *options]
    row = sampled_rows.measure(sampled_rows.parse(given))
    return row, {name for name, one in row["quantities"].items() if not one["holds"]}


def test_textbook_by_chunks_is_autograds():
    """Chunks that are no multiple of anything; float64."""
    torch.manual_seed(0)
    query, key, value, grad = (torch.randn(101, 8, dtype=torch.float64) for _ in range(4))
    leaves = [one.clone().requires_grad_() for one in (query, key, value)]
    scores = (leaves[0] @ leaves[1].T * 0.3).masked_fill(torch.ones(101, 101).triu(1).bool(), float("-inf"))
    expected = scores.softmax(1) @ leaves[2]
    wanted = torch.autograd.grad(expected, leaves, grad)
    head = Head(query, key, value, grad)
    reference = Reference(head, 0.3, torch.float64, queries=17, keys=13)
    output, lse = reference.forward()
    rows = torch.tensor([0, 1, 16, 17, 50, 100])
    mine = [reference.query_gradients(rows, output, lse), *reference.key_gradients(rows, output, lse)]
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(output, expected.detach(), **close)
    torch.testing.assert_close(lse, scores.detach().logsumexp(1), **close)
    for one, whole in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, whole[rows], **close)
    for one, whole in zip(rounded_attention(head, 0.3), (expected.detach(), *wanted), strict=True):
        torch.testing.assert_close(one, whole, **close)  # nothing is rounded where the narrow dtype is the wide one


@pytest.mark.parametrize(
    ("dtype", "groups", "queries"), [("float64", 2, 100), pytest.param("float32", 1, 0, marks=pytest.mark.slow)]
)
def test_what_is_right_passes(dtype, groups, queries, tmp_path):
    out = tmp_path / "rows.jsonl"
    more = [f"--length=301 --dtype={dtype} --groups={groups} --queries={queries} --out={out}".split()]
    assert sampled_rows.main([*OPTIONS, *more[0]]) == 0
    row = json.loads(out.read_text(encoding="utf-8"))
    assert row["ok"]
    assert row["made_again_bit_for_bit"]
    assert row["seq_len"] == 301
    assert {"o", "lse", "dq", "dk", "dv", "q", "k", "v", "do", "y", "dx"} < row["quantities"].keys()
    assert sum(name.startswith("dW") for name in row["quantities"]) == 9


@pytest.mark.slow
def test_a_run_over_its_bound_ends_with_1(monkeypatch):
    monkeypatch.setattr(sampled_rows, "FLOOR", {torch.float64: 1e-30})
    monkeypatch.setattr(sampled_rows, "USUAL", 0.0)
    assert sampled_rows.main([*OPTIONS, "--length=200", "--dtype=float64"]) == 1


def beyond_checks(monkeypatch, kernel):
    """``kernel`` in the place of the CPU's, where sequences are long."""

    def forward(inputs, settings, seed):
        return (kernel if inputs.query.shape[2] > CHECKED else FORWARD)(inputs, settings, seed)

    monkeypatch.setitem(attention._FORWARD, "cpu", forward)


def sees_the_next(inputs, settings, seed):
    """A mask that is off by one: each query sees one key too many."""
    tokens = inputs.query.shape[2]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril(1)
    return FORWARD(replace(inputs, mask=mask), replace(settings, causal=False), seed)


def wraps(inputs, settings, seed):
    """Counts elements of keys in too few bits: the last ones are read from the start."""
    key = inputs.key.clone()
    key[:, -1, -8:] = key[:, -1, :8]
    return FORWARD(replace(inputs, key=key), settings, seed)


def wrong_chunk(inputs, settings, seed):
    """One row of the log-sum-exp is that of another."""
    output, saved = FORWARD(inputs, settings, seed)
    lse = saved.tensors[0].clone()
    lse[:, :, 255] = lse[:, :, 254]
    saved.tensors = (lse, *saved.tensors[1:])
    return output, saved


@pytest.mark.parametrize(
    ("kernel", "seen"),
    [(sees_the_next, {"o", "lse"}), (wraps, {"o", "lse"}),
     pytest.param(wrong_chunk, {"lse", "dq"}, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_wrong_forward_is_seen(kernel, seen, monkeypatch):
    beyond_checks(monkeypatch, kernel)
    assert seen <= found()[1]


@pytest.mark.slow
def test_a_mask_that_is_off_by_one_is_seen_in_bfloat16(monkeypatch):
    """Where rounding hides most."""
    assert not {"o", "lse"} & found(1000, "bfloat16")[1]
    beyond_checks(monkeypatch, sees_the_next)
    assert {"o", "lse"} <= found(1000, "bfloat16")[1]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "name"), [(0, "dq"), (1, "dk"), (2, "dv")])
def test_a_wrong_backward_is_seen(place, name, monkeypatch):
    """One row of one head, the last: where numbers that wrap would come first."""

    def wrong(*given):
        grads = list(BACKWARD(*given))
        if given[0].shape[2] <= CHECKED:
            return tuple(grads)
        grads[place] = grads[place].clone()
        grads[place][0, -1, -1] = grads[place][0, -1, -2]
        return tuple(grads)

    monkeypatch.setitem(attention._BACKWARD, "cpu", wrong)
    assert name in found()[1]


@pytest.mark.slow
def test_a_tile_that_is_forgotten_is_seen(monkeypatch):
    """Results of attention that land in the wrong rows before the block goes on."""
    forward = tiled_mixing.attention_forward

    def late(*given, **how):
        output, saved = forward(*given, **how)
        if output.shape[2] > CHECKED:
            output[:, :, 128:256] = output[:, :, :128].clone()
        return output, saved

    monkeypatch.setattr(tiled_mixing, "attention_forward", late)
    assert "o" in found()[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--geometry", "nope"], "there are: tiny"),
        (["--length", "many"], "is not a token count"),
        (["--tile", "0"], "is not a whole number of at least 1"),
        (["--groups", "0"], "is not a whole number of at least 1"),
        (["--queries", "-1"], "is not a whole number of at least 1"),
        (["--key-heads", "a"], "is no list of numbers of heads"),
        (["--short", "0"], "is not a token count"),
        (["--dtype", "float8"], "invalid choice"),
        (["--device", "tpu"], "invalid choice"),
        (["--out", "none/rows.jsonl"], "there is no folder none"),
    ],
)
def test_what_cannot_be_asked_is_one_message(given, said, capsys):
    with pytest.raises(SystemExit) as ended:
        sampled_rows.parse([*OPTIONS, *given])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_blocks_that_cannot_be_measured_are_one_message(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "mamba", "num_hidden_layers": 2}))
    assert sampled_rows.main([*OPTIONS, "--geometry", str(config), "--length=64"]) == 2
    assert "a config of type 'mamba' has no num_attention_heads" in capsys.readouterr().err
    assert sampled_rows.main([*OPTIONS, "--length=64", "--key-heads=99"]) == 2
    assert "--key-heads 99: tiny has 2 heads of keys" in capsys.readouterr().err
