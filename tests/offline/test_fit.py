"""The longest sequence that trains: found by plans, whatever stands in the way is named."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from memo_runtime.cli.app import app
from memo_runtime.config import make_settings
from memo_runtime.errors import ArgumentError, HostLimitError, PlanInfeasibleError
from memo_runtime.machines.catalogue import find_machine
from memo_runtime.offline.fit import Bound, fit
from memo_runtime.offline.optimizers import OPTIMIZERS, find_optimizer
from memo_runtime.offline.planning import is_feasible_at, plan_at
from memo_runtime.offline.positions import check_positions
from memo_runtime.offline.profile import study_model
from memo_runtime.offline.subject import subject_named, subject_of
from memo_runtime.offline.trainable import LowRank, trained_in_part
from memo_runtime.persist import load_plan
from memo_runtime.sizes import Growth
from memo_runtime.units import GiB, MiB, format_bytes

transformers = pytest.importorskip("transformers")
H100 = find_machine("h100-80gb")
TINY = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("config") / "config.json"
    found.write_text(json.dumps(TINY))
    return str(found)


@pytest.fixture(scope="module")
def study(path):
    return study_model(subject_named(path), H100)


@pytest.mark.parametrize(
    ("policy", "budget", "host_bytes", "bound"),
    [
        ("auto", 2 * GiB, 1 << 45, Bound.HBM),
        ("auto", 2 * GiB, 64 * MiB, Bound.HOST),
        pytest.param("recompute", 2 * GiB, 1 << 45, Bound.HBM, marks=pytest.mark.slow),
        ("tiled", 2 * GiB, 64 * MiB, Bound.HOST),
    ],
)
def test_the_longest_fits_and_one_granule_more_does_not(study, policy, budget, host_bytes, bound):
    settings = make_settings(policy=policy, budget=budget)
    found = fit(study, settings, host_bytes=host_bytes)
    longest = found.longest
    assert longest.tokens % 128 == 0
    assert not is_feasible_at(study.at(longest.tokens + 128, host_bytes=host_bytes), settings)
    lengths = [reach.tokens for reach in found.reaches]
    assert lengths == sorted(set(lengths))
    for reach in found.reaches:
        assert reach.plan.forecast.peak_bytes <= budget
        assert reach.plan.forecast.host_bytes <= host_bytes
        assert reach.plan.seq_len == reach.tokens
    # What is named is what helps.
    assert longest.bound is bound
    more = study.at(longest.tokens + 128, host_bytes=(1 << 50) if bound is Bound.HOST else host_bytes)
    assert is_feasible_at(more, settings if bound is Bound.HOST else replace(settings, budget=1 << 50))


def test_memory_that_would_make_a_step_faster_is_named(study):
    settings = make_settings(policy="recompute", budget=2 * GiB)
    short = fit(study, replace(settings, budget=70 * GiB), host_bytes=1 << 40).reaches[0]
    assert short.bound is Bound.TIME
    tight = fit(study, make_settings(policy="auto", budget=GiB), host_bytes=1 << 40).reaches[-2]
    fast = plan_at(study.at(tight.tokens, host_bytes=1 << 40), make_settings(policy="auto", budget=70 * GiB))
    slower = tight.plan.forecast.step_seconds > 1.01 * fast.forecast.step_seconds
    assert (tight.bound is Bound.HBM) == slower


def test_what_cannot_fit_names_the_optimizers_that_do(study):
    parameters = sum(p.numel() for p in study.subject.model.parameters())
    bare = replace(study, optimizer=find_optimizer("sgd"))
    floor = plan_at(bare.at(1024), make_settings(policy="recompute")).forecast.peak_bytes
    # Room for states of four bytes for each parameter, and not for twelve.
    settings = make_settings(policy="recompute", budget=floor + 6 * parameters)
    with pytest.raises(PlanInfeasibleError) as caught:
        fit(replace(study, optimizer=find_optimizer("adamw-fp32")), settings)
    said = str(caught.value)
    assert "optimizer (adamw-fp32)" in said
    others = "adamw, adamw-foreach, adamw-bf16, adamw-8bit, adafactor, sgd-momentum, sgd, none"
    assert f"--optimizer {others} instead of adamw-fp32, at 1,024 tokens" in said
    assert plan_at(replace(study, optimizer=find_optimizer("adafactor")).at(1024), settings)
    with pytest.raises(PlanInfeasibleError) as caught:
        fit(study, make_settings(policy="auto", budget=parameters))
    said = str(caught.value)
    alone = format_bytes(4 * parameters)
    assert f"no other either: parameters and gradients are {alone}; --lora or --trainable" in said
    assert "memo fit" not in said
    with pytest.raises(HostLimitError):
        plan_at(study.at(1 << 17, host_bytes=MiB), make_settings(policy="swap"))


def test_what_grows_with_the_square_of_the_length_is_said(study):
    offline, settings = study.at(16384), make_settings(policy="recompute")
    assert not any("all pairs" in note for note in plan_at(offline, settings).notes)
    masked = replace(offline, profile=replace(offline.profile, shared=Growth(quadratic=2.0)))
    *_, note = plan_at(masked, settings).notes
    assert note.startswith("masks or biases for all pairs of tokens take 512.00 MiB at 16,384 tokens, and four times")


def test_states_of_optimizers(study):
    model = study.subject.model
    parameters = sum(p.numel() for p in model.parameters())
    sizes = {name: one.states(model).optimizer for name, one in OPTIMIZERS.items()}
    assert sizes["adamw"] == sizes["adamw-bf16"] == 4 * parameters
    assert sizes["adamw-fp32"] == 12 * parameters
    assert sizes["sgd-momentum"] == 2 * parameters
    assert sizes["sgd"] == sizes["none"] == 0
    assert 2 * parameters < sizes["adamw-8bit"] < 2.1 * parameters
    assert 0 < sizes["adafactor"] < 0.1 * parameters
    besides = {name: one.states(model).stepping for name, one in OPTIMIZERS.items()}
    assert besides.pop("adamw-foreach") == 2 * parameters
    # One parameter's and what is left of the one before.
    largest = max(p.nbytes for p in model.parameters())
    assert largest <= besides.pop("adafactor") <= 2.1 * largest
    assert set(besides.values()) == {0}
    with pytest.raises(ArgumentError, match="did you mean adafactor"):
        find_optimizer("adafacter")


@pytest.mark.slow
def test_frozen_weights_count_two_products(path, study):
    tokens, rank, whole = 4096, 8, study
    part = study_model(trained_in_part(subject_named(path), lora=rank, trainable=None), H100)
    adapters = [module for module in part.subject.model.modules() if isinstance(module, LowRank)]
    assert len(adapters) == 2 * 7
    trained = [p for p in part.subject.model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(adapters)
    linears = [module for module in whole.subject.model.modules() if isinstance(module, nn.Linear)]
    frozen, thin = (sum(p.numel() for p in some) for some in ([one.weight for one in linears], trained))
    # Nothing below the first block wants a gradient: q, k and v of it, and their adapters, have no product for that.
    first = part.subject.model.get_submodule("model.layers.0.self_attn")
    inputs = (first.q_proj, first.k_proj, first.v_proj)
    spared = sum(one.base.weight.numel() + one.down.weight.numel() for one in inputs)
    saved = 2 * frozen - 6 * thin + 2 * spared
    assert whole.at(tokens).model_flops - part.at(tokens).model_flops == pytest.approx(tokens * saved, rel=1e-9)
    assert part.at(tokens).profile.states.optimizer == 2 * sum(p.nbytes for p in trained)
    by_tiles = plan_at(part.at(1 << 16, host_bytes=1 << 40), make_settings(policy="tiled", budget=2 * GiB))
    assert by_tiles.forecast.step_seconds > 0


def test_parameters_are_trained_by_name(path):
    subject = trained_in_part(subject_named(path), lora=None, trainable=r"layers\.1\..*norm")
    trained = [name for name, p in subject.model.named_parameters() if p.requires_grad]
    assert trained == ["model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"]
    with pytest.raises(ArgumentError, match=r"in no parameter's name; there are model\.embed_tokens"):
        trained_in_part(subject_named(path), lora=None, trainable="q_project")
    with pytest.raises(ArgumentError, match="not a regular expression"):
        trained_in_part(subject_named(path), lora=None, trainable="(")
    with pytest.raises(ArgumentError, match="--lora 0 is not a rank"):
        trained_in_part(subject_named(path), lora=0, trainable=None)
    with pytest.raises(ArgumentError, match=r"more than full rank: .* no nn\.Linear of a rank above 256"):
        trained_in_part(subject_named(path), lora=257, trainable=None)


def test_positions_that_are_learned_end_the_search(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 512}))
    subject = subject_named(str(path))
    assert (subject.positions, subject.learned_positions) == (1024, True)
    found = fit(study_model(subject, H100), make_settings(policy="auto"), host_bytes=1 << 40)
    assert (found.longest.tokens, found.longest.bound) == (1024, Bound.POSITIONS)
    told = CliRunner().invoke(app, ["fit", "--model", str(path)]).stdout
    assert "learns a table of positions, which ends the search at 1,024 tokens: --max-positions" in told
    with pytest.raises(ArgumentError, match="give --max-positions 2048"):
        check_positions(subject, 2048, "--seq-len 2,048")
    check_positions(subject_named(str(path), max_positions=2048), 2048, "--seq-len 2,048")
    few = subject_named(str(path), max_positions=100)
    with pytest.raises(ArgumentError, match="learns 100 positions, and lengths are searched in steps of 128 tokens"):
        fit(study_model(few, H100), make_settings(policy="auto"))


def test_a_model_of_hugging_face_from_a_factory_is_planned_as_from_its_config(path, study):
    model = subject_named(path).model
    ids = torch.zeros(1, 64, dtype=torch.long, device="meta")
    # As users write it: the model keeps a cache, which is filled behind the first look at a block.
    made = subject_of("mine:make", model, ((), {"input_ids": ids, "labels": ids}))
    assert (made.positions, made.learned_positions, made.tiled_loss) == (4096, False, True)
    assert not subject_of("mine:make", model, ((), {"input_ids": ids})).tiled_loss
    settings = make_settings(policy="tiled")
    for one in (study_model(made, H100), study):
        assert [block.tiled_reason for block in one.at(1 << 16, tiles=True).profile.blocks] == ["", ""]
    mine, named = (plan_at(one.at(1 << 16), settings) for one in (study_model(made, H100), study))
    assert (mine.forecast.peak_bytes, mine.forecast.host_bytes) == (
        named.forecast.peak_bytes,
        named.forecast.host_bytes,
    )
    assert subject_of("mine:make", model, made.batch, max_positions=8192).positions == 8192


def test_a_table_of_positions_of_a_factory_is_not_lengthened():
    config = transformers.GPT2Config(n_layer=1, n_embd=64, n_head=4, vocab_size=512)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    assert subject_of("mine:make", model, ((), {})).learned_positions
    with pytest.raises(ArgumentError, match="cannot lengthen the table of positions that mine:make makes"):
        subject_of("mine:make", model, ((), {}), max_positions=2048)


def test_positions_that_are_computed_are_said(path, study):
    assert any("beyond the 4,096 positions" in note for note in study.at(8192).profile.notes)
    assert not any("positions" in note for note in study.at(4096).profile.notes)
    longer = subject_named(path, max_positions=8192)
    assert longer.model.config.max_position_embeddings == 8192 == longer.positions


def test_the_command(path, tmp_path):
    def memo(*arguments):
        return CliRunner().invoke(app, ["fit", "--model", path, *arguments])

    saved = tmp_path / "longest.json"
    asked = ("--host-memory", "1GiB", "--budget", "2GiB")
    table, as_json = memo(*asked, "--policy", "recompute"), memo(*asked, "--json", "-o", str(saved))
    assert (table.exit_code, as_json.exit_code) == (0, 0), table.output + as_json.output
    found = json.loads(as_json.stdout)
    assert found["longest"] == found["lengths"][-1]["seq_len"]
    assert " tokens at most" in table.stdout
    assert all(word in table.stdout for word in ("bound by", "replay", "beyond the 4,096 positions"))
    assert set(found["lengths"][0]) == {
        "seq_len", "step_seconds", "mfu", "peak_bytes", "host_bytes", "executor", "bound"
    }  # fmt: skip
    plan = load_plan(saved)
    assert (plan.seq_len, plan.forecast.host_bytes) == (found["longest"], found["lengths"][-1]["host_bytes"])
    assert plan.placement
    refused = memo("--budget", "20MiB", "--policy", "recompute")
    assert refused.exit_code == 3
    assert "optimizer" in refused.output
    assert memo("--optimizer", "adamm").exit_code == 2


@pytest.mark.slow
def test_no_length_below_the_longest_is_refused(tmp_path):
    """The norm behind the blocks runs by tiles from 149,797 tokens on here, and below where nothing fits otherwise."""
    qwen2 = {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(qwen2))
    subject = trained_in_part(subject_named(str(tmp_path)), lora=16, trainable=None)
    study = study_model(subject, find_machine("rtx-4090"), optimizer=find_optimizer("adamw-8bit"))
    longest = fit(study, make_settings()).longest.tokens
    assert longest == 185_088
    lengths = [*range(16_384, longest, 16_384), 149_760, 150_016, longest]
    assert all(is_feasible_at(study.at(tokens), make_settings()) for tokens in lengths)
    assert not is_feasible_at(study.at(longest + 128), make_settings())


def test_a_budget_below_the_model_itself_is_refused_with_what_tiles_need(study):
    """Nothing can fit it, but the floor and the least budget are those of tiles, which auto takes there."""
    offline = study.at(1 << 17, host_bytes=1 << 40)
    said = []
    for policy in ("auto", "tiled"):
        with pytest.raises(PlanInfeasibleError) as refused:
            plan_at(offline, make_settings(policy=policy, budget=MiB))
        said.append(re.findall(r"it needs ([\d.]+ .iB)|floor +([\d.]+ .iB)|--budget ([\d.]+)", str(refused.value)))
        assert "replay alone" not in str(refused.value)
    assert said[0] == said[1]
    assert len(said[0]) == 3
