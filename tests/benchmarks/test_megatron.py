"""Megatron-core's contenders. Where it is not installed, what joins weights is tested all the same."""

import pytest
import torch
from torch import nn

from benchmarks.harness.contenders import CONTENDERS
from benchmarks.harness.contenders.megatron_weights import joined
from benchmarks.harness.contenders.packages import MEGATRON, TRITON, SkippedError
from benchmarks.harness.geometry import Scope
from benchmarks.harness.subject import Subject

needs_megatron = pytest.mark.skipif(
    not (MEGATRON.is_there and TRITON.is_there),
    reason=f"needs Megatron-core: pip install {MEGATRON.requirement} {TRITON.requirement}",
)
#: The MEMO paper's GPT in small: layer norms, biases, no gate.
GPT = """{
  "model_type": "starcoder2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "gelu_pytorch_tanh",
  "norm_epsilon": 1e-5, "use_bias": true, "sliding_window": null, "residual_dropout": 0.0, "embedding_dropout": 0.0,
  "attention_dropout": 0.0, "bos_token_id": null, "eos_token_id": null
}"""


@pytest.fixture
def geometry(tmp_path):
    path = tmp_path / "gpt.json"
    path.write_text(GPT)
    return str(path)


def test_heads_are_joined_group_by_group_and_the_gate_comes_first(make_job):
    subject = Subject(make_job("unwrapped").settings, longest=64)
    layer, shape = subject.layers[0], subject.shape
    there = dict(layer.named_parameters())
    found = {one.name: one for one in joined(layer, gated=True, kv_heads=shape.kv_heads)}
    assert len(found) == 6
    size, queries = shape.head_dim, shape.heads // shape.kv_heads * shape.head_dim
    whole = found["self_attention.linear_qkv.weight"].join(there)
    for group in range(shape.kv_heads):
        rows = whole[group * (queries + 2 * size) : (group + 1) * (queries + 2 * size)]
        first = slice(group * size, (group + 1) * size)
        assert torch.equal(rows[:queries], there["self_attn.q_proj.weight"][group * queries : (group + 1) * queries])
        assert torch.equal(rows[queries:-size], there["self_attn.k_proj.weight"][first])
        assert torch.equal(rows[-size:], there["self_attn.v_proj.weight"][first])
    gate = found["mlp.linear_fc1.weight"].join(there)
    assert torch.equal(gate[: shape.intermediate], there["mlp.gate_proj.weight"])
    back = {name: part for one in found.values() for name, part in one.split(one.join(there)).items()}
    assert back.keys() == there.keys()
    assert all(torch.equal(back[name], there[name]) for name in there)


def test_a_parameter_without_a_place_is_named(make_job):
    layer = Subject(make_job("unwrapped").settings, longest=64).layers[0]
    layer.self_attn.q_norm = nn.RMSNorm(16)
    with pytest.raises(ValueError, match=r"no place for self_attn\.q_norm\.weight"):
        joined(layer, gated=True, kv_heads=2)


def gradients(contender):
    found = {}
    contender.step(lambda given: found.update({name: tensor.clone() for name, tensor in given.items()}))
    return found


@needs_megatron
@pytest.mark.parametrize("name", ["megatron-full", "megatron-mlp-chunks"])
def test_layers_with_biases_and_layer_norms_at_two_lengths(make_job, geometry, name):
    made = []
    for one in ("unwrapped", name):
        job = make_job(one, (40, 72), dtype="float64", geometry=geometry)
        made.append(CONTENDERS[one](job))
    for tokens in (40, 72):
        for one in made:
            one.start(tokens)
        expected, found = (gradients(one) for one in made)
        assert found.keys() == expected.keys()
        for key, reference in expected.items():
            torch.testing.assert_close(found[key], reference, rtol=1e-9, atol=1e-12)
        for one in made:
            one.finish()


@needs_megatron
def test_a_whole_step_changes_weights_as_everybodys_does(make_job):
    made = [
        CONTENDERS[name](make_job(name, dtype="float64", scope=Scope.STEP)) for name in ("unwrapped", "megatron-full")
    ]
    for one in made:
        one.start(64)
        one.step()
    theirs, ours = (gradients(one) for one in made)
    for key, reference in theirs.items():
        assert (ours[key] - reference).norm() <= 1e-5 * reference.norm()


@needs_megatron
def test_the_row_says_how(make_job):
    contender = CONTENDERS["megatron-mlp-chunks"](make_job("megatron-mlp-chunks", (200,)))
    contender.start(200)
    assert contender.details()["settings"] == {
        "TransformerConfig": {
            "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
            "transformer_impl": "local",
        },
        "mlp_chunks_for_training": 3,
    }  # fmt: skip


@needs_megatron
def test_layers_see_the_same_strides_at_every_length(make_job):
    """Where fused functions are compiled, strides that change with the length would be a reason to compile again."""
    contender, seen = CONTENDERS["megatron-full"](make_job("megatron-full", (64, 96))), set()

    def look(layer, args, given):
        seen.add(given["hidden_states"].stride())

    for layer in contender._stack.gpt.decoder.layers:
        layer.register_forward_pre_hook(look, with_kwargs=True)
    for tokens in (64, 96):
        contender.start(tokens)
        contender.step()
    hidden = contender.subject.shape.hidden
    assert seen == {(hidden, hidden, 1)}


@needs_megatron
def test_checkpoints_do_not_stop_before_the_last_product(make_job):
    shape = CONTENDERS["checkpoint"](make_job("checkpoint")).subject.shape
    contender = CONTENDERS["megatron-full"](make_job("megatron-full"))
    last = 2 * 64 * shape.blocks * shape.intermediate * shape.hidden
    assert contender.recomputed_flops(64) == shape.rerun_flops(64, attention=True) + last
    assert CONTENDERS["megatron-selective"](make_job("megatron-selective")).recomputed_flops(64) == 3 * last


@needs_megatron
def test_layers_that_it_does_not_have_are_refused(make_job):
    with pytest.raises(SkippedError, match="megatron-full has layers like those of llama and starcoder2, not qwen3"):
        CONTENDERS["megatron-full"](make_job("megatron-full", geometry="qwen3-tiny"))


@needs_megatron
def test_a_checkpoint_that_would_never_end_is_refused(make_job, geometry):
    with pytest.raises(SkippedError, match="megatron-selective is for layers without biases"):
        CONTENDERS["megatron-selective"](make_job("megatron-selective", geometry=geometry))
