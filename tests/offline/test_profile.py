"""Offline profiles against those that are measured: the same bytes exactly, on the same model."""

import json

import pytest
import torch

import memo_runtime as memo
from memo_runtime.errors import ArgumentError, PlanMismatchError, ProfileError
from memo_runtime.machines.catalogue import find_machine
from memo_runtime.offline.geometries import CONFIGS, known_names
from memo_runtime.offline.planning import finished
from memo_runtime.offline.profile import profile_offline
from memo_runtime.offline.subject import subject_named, subject_of
from memo_runtime.records import Role

TINY = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
}  # fmt: skip
H100 = find_machine("h100-80gb")


@pytest.fixture
def config(tmp_path):
    def write(**changes):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**TINY, **changes}))
        return str(path)

    return write


def test_what_is_saved_is_what_a_measured_profile_says(config):
    transformers = pytest.importorskip("transformers")
    subject = subject_named(config(), dtype=torch.float32)
    offline = profile_offline(subject, H100, tokens=2048).profile
    fields = {key: value for key, value in TINY.items() if key != "model_type"}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **fields))
    ids = torch.randint(512, (1, 128))
    measured = memo.profile(model, {"input_ids": ids, "labels": ids, "use_cache": False})
    assert [block.name for block in offline.blocks] == [block.name for block in measured.blocks]
    for here, there in zip(offline.blocks, measured.blocks, strict=True):
        assert here.groups == there.groups
        assert (here.saved, here.pins, here.sliceable) == (there.saved, there.pins, there.sliceable)
        assert here.gradients == there.gradients
    assert offline.states.parameters == measured.states.parameters
    assert offline.states.optimizer == measured.states.optimizer
    # Pinned memory follows from groups alone: plans with the same choices need the same to the byte.
    plans = [memo.plan(p, policy="memo", alpha=0.4, seq_len=2048, host_budget="1TB") for p in (offline, measured)]
    assert plans[0].forecast.host_bytes == plans[1].forecast.host_bytes > 0


def test_an_offline_plan_is_to_read_and_not_to_run(config):
    transformers = pytest.importorskip("transformers")
    subject = subject_named(config(num_hidden_layers=2), dtype=torch.float32)
    plan = memo.plan(profile_offline(subject, H100, tokens=64).profile, policy="swap", host_budget="1TB")
    fields = {**TINY, "num_hidden_layers": 2}
    kind = fields.pop("model_type")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **fields))
    memo.wrap(model, plan=plan)
    ids = torch.randint(512, (1, 64))
    with pytest.raises(PlanMismatchError, match="offline:NVIDIA H100"):
        model(input_ids=ids, labels=ids, use_cache=False)


def test_dropout_in_attention_makes_no_matrix_of_weights(tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 512}))
    subject = subject_named(str(path))
    assert subject.model.config.attn_pdrop > 0
    block = profile_offline(subject, H100, tokens=2048).profile.blocks[0]
    assert not any(group.size.quadratic for group in block.groups)
    assert any(group.role is Role.MIXER for group in block.groups)


def test_ranks_share_tokens_states_and_attention(config):
    subject = subject_named(config())
    one = profile_offline(subject, H100, tokens=65536, host_bytes=1 << 40)
    two = profile_offline(subject, H100, tokens=65536, gpus=2, host_bytes=1 << 40)
    assert two.profile.blocks[0].tokens == 32768 == one.profile.blocks[0].tokens // 2
    assert two.profile.host_bytes == one.profile.host_bytes // 2 == 1 << 39
    assert two.profile.states.parameters == one.profile.states.parameters // 2
    assert two.model_flops == one.model_flops
    assert two.study.ranks.ulysses
    work = [o.profile.blocks[0].forward_flops.at(o.profile.blocks[0].tokens) for o in (one, two)]
    assert work[1] == work[0] // 2
    first, second = (o.profile.blocks[0].forward_seconds.exact(o.profile.blocks[0].tokens) for o in (one, two))
    assert first / 2 < second  # half of the work, and the exchange
    sizes = [[g.size for g in o.profile.blocks[0].groups] for o in (one, two)]
    assert sizes[0] == sizes[1]  # by local tokens


def test_heads_that_do_not_divide_go_round_in_a_ring(config):
    subject = subject_named(config(num_key_value_heads=1))
    ring = profile_offline(subject, H100, tokens=4096, gpus=4)
    assert not ring.study.ranks.ulysses
    # Keys and values of 16 elements in bf16 go to three neighbours, and in backward their gradients too.
    exchanged = 3 * (1 + 2) * 2 * 16 * 2 * 1024
    assert ring.sent_bytes == 4 * exchanged + states_sent(subject.model, 4)


def states_sent(model, gpus):
    """Parameters of blocks are gathered twice, the others once, gradients are scattered; in bf16, all but a share."""
    sizes = [((2 if ".layers." in name else 1) + 1) * 2 * p.numel() for name, p in model.named_parameters()]
    return sum(sizes) * (gpus - 1) // gpus


def test_what_a_rank_sends_is_counted(config):
    subject = subject_named(config())
    one, two = (profile_offline(subject, H100, tokens=4096, gpus=gpus) for gpus in (1, 2))
    assert (one.sent_bytes, one.sent_seconds) == (0, 0)
    # Ulysses: queries and results of 64 elements, keys and values of 32; half of each stays, backward sends as much.
    exchanged = 2 * (2 * 64 + 2 * 32) * 2 * 2048 // 2
    assert two.sent_bytes == 4 * exchanged + states_sent(subject.model, 2)
    assert two.sent_seconds == two.sent_bytes / H100.gpu_rate
    plan = finished(memo.plan(two.profile, policy="swap", host_budget="1TB"), two)
    assert plan.forecast.collective_bytes == two.sent_bytes
    assert "sent to GPUs" in str(plan)
    assert "sent to GPUs" not in str(finished(memo.plan(one.profile, policy="swap", host_budget="1TB"), one))


def test_model_flops_are_those_of_the_formula(config):
    from memo_runtime.reporting.mfu import model_flops

    subject = subject_named(config())
    offline = profile_offline(subject, H100, tokens=8192)
    products = sum(p.numel() for n, p in subject.model.named_parameters() if p.dim() == 2 and "embed_tokens" not in n)
    expected = model_flops(parameters=products, layers=4, attention_width=64, tokens=8192)
    assert offline.model_flops == expected


def test_layers_of_two_kinds_are_two_kinds(config):
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 128}
    offline = profile_offline(subject_named(config(model_type="gemma3_text", **kinds)), H100, tokens=4096)
    assert len(set(offline.study.kinds.values())) == 2


class Reads(torch.nn.Module):
    """Looks at values, which are not there."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(3))

    def forward(self, x):
        if x.sum().item() > 0:
            x = x + 1
        for block in self.blocks:
            x = block(x)
        return x


def test_a_model_that_depends_on_values_is_refused_by_name():
    subject = subject_of("reads", Reads(), ((torch.zeros(1, 16, 8),), {}))
    with pytest.raises(ProfileError, match=r"reads looks at values, .* depends on data"):
        profile_offline(subject, H100, tokens=1024)


def test_a_batch_that_the_model_does_not_take_says_so():
    blocks = (torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(3))
    subject = subject_of("wrong", torch.nn.Sequential(*blocks), ((torch.zeros(1, 16, 9),), {}))
    with pytest.raises(ProfileError, match=r"wrong raises when it is called: RuntimeError: .*its batch or its dtype"):
        profile_offline(subject, H100, tokens=1024)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lama-8b", "did you mean llama-8b"),
        ("nothing-like-it", "there are llama-1b"),
        ("missing/config.json", "cannot read"),
    ],
)
def test_unknown_models_say_what_there_is(name, said):
    with pytest.raises(ArgumentError, match=said):
        subject_named(name)


def test_configs_that_are_none_are_refused(tmp_path, config):
    path = tmp_path / "other.json"
    for text, said in (("{", "is not a config.json"), ("[]", "no field 'model_type'"), ("{}", "no field 'model_type'")):
        path.write_text(text)
        with pytest.raises(ArgumentError, match=said):
            subject_named(str(path))
    with pytest.raises(ArgumentError, match="no causal language model"):
        subject_named(config(model_type="vit"))


def test_names_are_those_of_the_example():
    from examples.geometries import GEOMETRIES

    for name in set(CONFIGS) & set(GEOMETRIES):
        fields = {key: value for key, value in CONFIGS[name].items() if key != "model_type"}
        assert fields == dict(GEOMETRIES[name].fields)
    assert {"llama-8b", "llama-1b", "llama-1b-d128", "memo-7b"} <= set(known_names())


