"""DeepSpeed's engine with its optimizer on the host, for real: the CPU is its device and its host."""

import io
import json
import os
from dataclasses import replace

import pytest
import torch
from torch import distributed

from benchmarks.harness.contenders import CONTENDERS, deepspeed, deepspeed_zero
from benchmarks.harness.contenders.packages import DEEPSPEED, SkippedError
from benchmarks.harness.geometry import Scope, make_config
from benchmarks.harness.reference import refer
from benchmarks.harness.rows import REFERENCE
from benchmarks.harness.sketch import encode, relative_difference, sketch
from benchmarks.harness.worker import walk
from tests.benchmarks.test_imitated_gpu import Accelerator

NAME, TOKENS, BLOCKS = "deepspeed-zero-offload", 200, 3

needs_deepspeed = pytest.mark.skipif(not DEEPSPEED.is_there, reason=f"pip install {DEEPSPEED.requirement}")


@pytest.fixture
def job(make_job):
    """Of several tiles in MLPs and loss."""

    def make(name=NAME, lengths=(TOKENS,), *, scope=Scope.STEP, **more):
        return make_job(name, lengths, blocks=BLOCKS, scope=scope, **more)

    return make


@pytest.fixture
def made(monkeypatch):
    """A contender with a batch, closed when the test ends."""
    monkeypatch.setattr(deepspeed, "_LOGITS", 4 * 320 * 64)
    contenders = []

    def make(job):
        try:
            contender = CONTENDERS[job.contender](job)
        except SkippedError as error:
            if "cannot be compiled" in str(error):
                pytest.skip(str(error))
            raise
        contenders.append(contender)
        contender.start(job.lengths[0])
        return contender

    yield make
    for one in contenders:
        one.close()
    assert not distributed.is_initialized()


def stepped(contender, times=1):
    found = {}
    contender.step(lambda given: found.update({name: tensor.clone() for name, tensor in given.items()}))
    for _ in range(times - 1):
        contender.step()
    return found


def apart(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[name] - one).norm() / one.norm()) for name, one in expected.items())


def weights(contender):
    return {name: one.detach().clone() for name, one in contender.subject.model.named_parameters()}


@pytest.fixture
def untied(tmp_path):
    """A config with a head of its own."""
    values = make_config("tiny", tokens=TOKENS, blocks=BLOCKS).to_dict() | {"tie_word_embeddings": False}
    path = tmp_path / "untied.json"
    path.write_text(json.dumps(values))
    return str(path)


@needs_deepspeed
@pytest.mark.parametrize("bucket", [None, 20_000])
@pytest.mark.parametrize("tied", [True, False])
def test_it_trains_as_everybody_does(job, made, untied, monkeypatch, *, tied, bucket):
    """The second bucket is smaller than most weights, whose gradients then go on their own.

    Weights of norms are 1: without decay they would move by a hundredth more. Its AdamW rounds other than PyTorch's.
    """
    if bucket is not None:
        monkeypatch.setitem(deepspeed_zero._ZERO, "reduce_bucket_size", bucket)
    geometry = "tiny" if tied else untied
    plain, contender = made(job("unwrapped", geometry=geometry)), made(job(geometry=geometry))
    assert contender.subject.config.tie_word_embeddings == tied
    before = weights(plain)
    expected, found = stepped(plain, 3), stepped(contender, 3)
    assert apart(found, expected) < 1e-5
    moved = {name: one - before[name] for name, one in weights(plain).items()}
    assert apart({name: one - before[name] for name, one in weights(contender).items()}, moved) < 5e-3
    assert all(one.grad is None for one in contender.subject.model.parameters())


@needs_deepspeed
def test_a_wrong_gradient_is_seen(job, made):
    contender = made(job())
    twice = contender.subject.layers[1].mlp.up_proj.weight
    twice.register_hook(lambda gradient: 2 * gradient)
    found, expected = stepped(contender), stepped(made(job("unwrapped")))
    wrong = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(found.pop(wrong), 2 * expected.pop(wrong), rtol=1e-4, atol=1e-6)
    assert apart(found, expected) < 1e-5


@needs_deepspeed
def test_master_weights_and_states_are_wide_and_tables_stay_so(job, made):
    made_job = job(dtype="bfloat16")
    contender = made(made_job)
    assert contender.subject.stack.rotary_emb.inv_freq.dtype == torch.float32
    reference = refer(replace(made_job, contender=REFERENCE))
    found = encode(sketch(stepped(contender)))
    assert relative_difference(found, reference["gradient_sketch"]) < 0.05
    masters = [one for group in contender._optimizer.param_groups for one in group["params"]]
    count = sum(one.numel() for one in contender.subject.model.parameters())
    assert sum(one.numel() for one in masters) - count in range(4)  # it aligns what it flattens
    states = [value for state in contender._optimizer.state.values() for value in state.values()]
    assert {one.dtype for one in masters} == {torch.float32}
    assert {one.dtype for one in states if isinstance(one, torch.Tensor)} == {torch.float32}
    assert contender.resident_bytes() >= (2 + 4 * 4) * count


@needs_deepspeed
def test_inputs_of_blocks_go_to_the_host_too(job, made, monkeypatch):
    from deepspeed.runtime.activation_checkpointing import offload_activations

    accelerator = Accelerator()
    monkeypatch.setattr(offload_activations, "get_accelerator", lambda: accelerator)
    contender = made(job())
    assert apart(stepped(contender), stepped(made(job("unwrapped")))) < 1e-5
    assert contender._manager.stats.restored_tensors == BLOCKS - 1
    contender.finish()
    assert contender._manager is None


def rows(job):
    out = io.StringIO()
    walk(job, out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


@needs_deepspeed
@pytest.mark.parametrize("rehearse", [False, True])
def test_rows_say_how_it_was_set_up_and_nothing_is_left(job, made, rehearse):
    made(job()).close()
    asked = job(lengths=(96, TOKENS))
    found = rows(replace(asked, settings=replace(asked.settings, rehearse=rehearse)))
    assert [(row["status"], row["seq_len"]) for row in found] == [("ok", 96), ("ok", TOKENS)]
    said = found[1]["details"]["settings"]
    assert said["deepspeed.initialize"]["zero_optimization"]["offload_optimizer"] == {
        "device": "cpu",
        "pin_memory": True,
    }
    assert said["deepspeed.initialize"]["optimizer"]["params"] == {
        "lr": 1e-5,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.01,
    }
    assert found[1]["peak_allocated"] > found[0]["peak_allocated"]
    assert "LOCAL_RANK" not in os.environ
    assert not distributed.is_initialized()


@needs_deepspeed
def test_where_it_finds_no_memory_it_is_out_of_memory(job, made, monkeypatch):
    import deepspeed as library

    def short(**_):
        raise torch.OutOfMemoryError("no more")

    made(job()).close()
    monkeypatch.setattr(library, "initialize", short)
    (row,) = rows(job())
    assert row["status"] == "oom"
    assert not distributed.is_initialized()


@needs_deepspeed
def test_without_a_compiler_it_is_skipped(job, monkeypatch):
    from deepspeed.ops import op_builder

    def fail(_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(op_builder.CPUAdamBuilder, "load", fail)
    (row,) = rows(job())
    assert row["status"] == "skipped"
    assert "cannot be compiled here (no compiler)" in row["error"]


@pytest.mark.parametrize(
    ("more", "message"),
    [({"scope": Scope.BLOCKS}, "use --scope step"), ({"dtype": "float64"}, "bfloat16 and float32 only, not float64")],
)
def test_what_it_does_not_train_is_skipped(job, more, message):
    (row,) = rows(job(**more))
    assert (row["status"], row["rehearsed"]) == ("skipped", False)
    assert message in row["error"]


@pytest.mark.skipif(DEEPSPEED.is_there, reason="DeepSpeed is installed")
def test_it_names_its_package(job):
    with pytest.raises(SkippedError, match=rf"^{NAME} needs deepspeed, .*{DEEPSPEED.requirement}$"):
        CONTENDERS[NAME](job())
