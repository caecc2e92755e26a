"""Geometries as they are counted: windows, blocks that differ, and families that nobody here can train."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.harness import reference
from benchmarks.harness.contenders import CONTENDERS, megatron
from benchmarks.harness.contenders.packages import SkippedError
from benchmarks.harness.counted import find_windows
from benchmarks.harness.geometry import Scope, Shape, UnknownGeometryError
from benchmarks.harness.reference import refer
from benchmarks.harness.runner import main
from benchmarks.harness.sketch import relative_difference
from benchmarks.harness.subject import Subject
from tests.benchmarks.test_runner import rows_of

FIELDS = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOWED = {
    "mistral": {"sliding_window": 24},
    "phi3": {"sliding_window": 24},
    "starcoder2": {"sliding_window": 24},
    "mixtral": {"sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
}
UNSUPPORTED = ("bert", "falcon", "gpt_neox", "phi", "gemma2", "gpt_oss")


@pytest.fixture
def config(tmp_path):
    """The path of a small config of a type, with what a test adds."""

    def make(kind, **more):
        path = tmp_path / f"{kind}.json"
        fields = {name: value for name, value in FIELDS.items() if (kind, name) != ("falcon", "head_dim")}
        path.write_text(json.dumps({"model_type": kind, **fields, **more}))
        return str(path)

    return make


def subject(make_job, geometry, scope=Scope.STEP, tokens=64, **more):
    settings = make_job("unwrapped", geometry=geometry, scope=scope, dtype="float64").settings
    return Subject(replace(settings, blocks=None), longest=tokens, **more)


def gradients(found, tokens=64):
    kept = {}
    found.backward(found.batch(tokens), lambda given: kept.update({name: one.clone() for name, one in given.items()}))
    return kept


def test_a_window_costs_what_it_reaches():
    plain = Shape(hidden=8, intermediate=8, blocks=2, heads=2, kv_heads=2, head_dim=4, vocabulary=0)
    windowed = replace(plain, windows=(16,))
    pairs = sum(min(place, 16) for place in range(1, 65))
    assert windowed.attended(64) - 64**2 == pytest.approx(2 * pairs, rel=0.02)
    assert windowed.attended(16) == plain.attended(16) == 2 * 16**2
    assert plain.model_flops(64) - windowed.model_flops(64) == 6 * 8 * (plain.attended(64) - windowed.attended(64)) > 0
    again = [shape.rerun_flops(64, attention=True) for shape in (plain, windowed)]
    assert again[0] - again[1] == 2 * 8 * (plain.attended(64) - windowed.attended(64))


@pytest.mark.parametrize("kind", WINDOWED)
def test_windows_are_those_of_the_masks_that_the_model_makes(make_job, config, monkeypatch, kind):
    """Of every family that is counted with windows, the reference is the model, and masks have the pairs that count."""
    path, seen, attention = config(kind, **WINDOWED[kind]), [], reference._attention

    def looks(module, query, key, value, mask, **options):
        seen.append(query.shape[2] * (query.shape[2] + 1) // 2 if mask is None else int(mask.sum()))
        return attention(module, query, key, value, mask, **options)

    monkeypatch.setattr(reference, "_attention", looks)
    plain = subject(make_job, path)
    wide = subject(make_job, path, attention=reference._registered())
    for one in (plain, wide):
        reference.plain_experts(one.model)
    losses = [gradients(one) for one in (plain, wide)]
    # As S^2 is twice the pairs of S (S + 1) / 2 but for S, so it is with a window.
    windows = plain.shape.windows
    assert 2 * sum(seen) == plain.shape.attended(64) + sum(windows) + 64 * (plain.shape.blocks - len(windows))
    assert plain.shape.attended(64) < 64**2 * plain.shape.blocks
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.allclose(losses[0][name], losses[1][name], rtol=1e-9, atol=1e-12) for name in losses[0])


def test_masked_attention_of_the_reference_goes_by_chunks(make_job, config, monkeypatch):
    path = config("mistral", sliding_window=24)
    whole = gradients(subject(make_job, path, attention=reference._registered()))
    monkeypatch.setattr(reference, "_ROWS", 17)
    parts = gradients(subject(make_job, path, attention=reference._registered()))
    assert all(torch.allclose(whole[name], parts[name], rtol=1e-9, atol=1e-12) for name in whole)


def test_a_field_that_the_model_does_not_read_is_no_window(make_job, config):
    found = subject(make_job, config("llama", sliding_window=24), scope=Scope.BLOCKS)
    assert found.shape.windows == ()
    odd = subject(make_job, config("llama"))
    odd.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UnknownGeometryError, match="has blocks of chunked_attention, whose FLOPs are not counted"):
        find_windows(odd.config, odd.model)


@pytest.mark.usefixtures("in_process")
def test_a_windowed_model_is_compared_with_itself(arguments, config, capsys):
    given = ["--geometry", config("mistral", sliding_window=24), "--scope", "step"]
    given = arguments("memo-auto,unwrapped,kernels", *given, lengths="96")
    assert main(given) == 0
    found, memo, plain, kernels = rows_of(given)
    assert found["details"]["rounding"] < 1e-5
    assert memo["gradient_difference"] < 1e-4
    assert plain["gradient_difference"] < 1e-4
    assert kernels["status"] == "skipped"
    assert "blocks of this geometry have a window of 24 tokens" in kernels["error"]
    assert plain["model_flops"] < plain["seq_len"] * 6 * (2 * 36_864 + 256 * 64) + 6 * 2 * 64 * 96**2


@pytest.mark.usefixtures("in_process")
def test_blocks_alone_have_no_windows(arguments, config, tmp_path, capsys):
    path = config("mistral", sliding_window=24)
    for contenders in ("unwrapped", "kernels", "memo-auto,unwrapped"):
        # The shorter one would be right, and is the length of the reference.
        assert main(arguments(contenders, "--geometry", path, lengths="16,96")) == 2
        assert "see the last 24 tokens only, by a mask that their model makes" in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()
    assert main(arguments("unwrapped", "--geometry", path, lengths="16,24")) == 0


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("kind", "scope"), [(kind, scope) for kind in UNSUPPORTED for scope in Scope])
def test_a_family_that_nobody_trains_is_one_refusal_and_no_row(arguments, config, capsys, kind, scope):
    path = config(kind, num_local_experts=4) if kind == "gpt_oss" else config(kind)
    for contenders in ("unwrapped,memo-auto", "kernels"):
        assert main(arguments(contenders, "--geometry", path, "--scope", scope.value)) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ")
        assert "such as those of Llama" in last
    assert not Path(path).with_name("rows.jsonl").exists()


def test_blocks_that_take_other_tables_than_llama_s_are_not_called_alone(make_job, config):
    path = config("gemma3_text", sliding_window=4096)
    with pytest.raises(UnknownGeometryError, match=r"not called as Llama's are.* give --scope step"):
        subject(make_job, path, scope=Scope.BLOCKS)
    subject(make_job, path)


def test_blocks_that_differ_are_refused_whichever_is_first(make_job, config):
    for first in (0, 1):
        path = config("qwen3_moe", **MOE, mlp_only_layers=[first])
        with pytest.raises(UnknownGeometryError, match="weights in matrix products, and FLOPs would be counted for"):
            subject(make_job, path)
    subject(make_job, config("qwen3_moe", **MOE))


def test_dropout_is_refused(make_job, config):
    with pytest.raises(UnknownGeometryError, match=r"have dropout of 0\.1"):
        subject(make_job, config("llama", attention_dropout=0.1))


def test_megatron_s_layers_have_no_windows(make_job, config, monkeypatch):
    for name in ("need", "imported"):
        monkeypatch.setattr(megatron, name, lambda *_: None)
    job = make_job("megatron-full", geometry=config("starcoder2", sliding_window=24), scope=Scope.STEP)
    with pytest.raises(SkippedError, match="blocks of this geometry have a window of 24"):
        CONTENDERS["megatron-full"](job)


def test_experts_have_a_reference_in_float64(make_job, config):
    found = refer(make_job("unwrapped", geometry=config("qwen3_moe", **MOE)))
    assert found["details"]["dtype"] == "float64"
    assert found["details"]["rounding"] < 1e-5


@pytest.mark.parametrize("scope", list(Scope))
def test_rounding_is_that_of_plain_pytorch_and_of_no_contender(make_job, scope):
    found = refer(make_job("unwrapped", scope=scope, dtype="bfloat16"))
    alone = refer(make_job("unwrapped", scope=scope, dtype="bfloat16", wider=False, plain=True))
    assert alone["details"] == {"dtype": "bfloat16"}
    apart = relative_difference(alone["gradient_sketch"], found["gradient_sketch"])
    assert found["details"] == {"dtype": "float32", "rounding": apart}
    assert 1e-3 < apart < 0.05
