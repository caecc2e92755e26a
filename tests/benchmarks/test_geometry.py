from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.contenders import CONTENDERS, compiled
from benchmarks.harness.contenders.packages import SkippedError
from benchmarks.harness.geometry import Scope, make_config, make_shape
from benchmarks.harness.subject import Subject


def shape(name, scope=Scope.BLOCKS, blocks=None):
    return make_shape(make_config(name, tokens=1024, blocks=blocks), scope)


def test_flops_of_the_8b_blocks_are_those_of_the_formula():
    found = shape("llama-8b", blocks=4)
    block = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336
    tokens = 65_536
    assert found.model_flops(tokens) == 6 * 4 * block * tokens + 6 * 4 * 4096 * tokens**2


def test_the_head_counts_in_a_whole_step_and_the_embedding_does_not():
    step, alone = shape("llama-1b-d128", Scope.STEP), shape("llama-1b-d128")
    assert step.model_flops(1024) - alone.model_flops(1024) == 6 * 1024 * 128_256 * 2048


def test_the_share_of_the_paper_s_7b_is_an_eighth_of_its_blocks():
    found = shape("gpt-7b-tp8")
    assert (found.blocks, found.hidden, found.attention_width) == (32, 4096, 4 * 128)
    # GPT 7B: 12 h^2 parameters in the products of a block.
    assert sum(linear.size for linear in found.linears) == 12 * 4096 * 4096 // 8
    assert "gate_proj" not in [linear.name for linear in found.linears]


def test_a_token_meets_some_of_the_experts_and_their_router():
    found = shape("olmoe-1b-7b", blocks=1)
    block = 4 * 2048 * 2048 + 64 * 2048 + 8 * 3 * 2048 * 1024
    assert found.model_flops(512) == 6 * block * 512 + 6 * 2048 * 512**2
    assert sum(one.weights for one in found.linears) == 4 * 2048 * 2048 + 64 * 2048 + 64 * 3 * 2048 * 1024


@pytest.mark.parametrize("geometry", ["olmoe-1b-7b", "olmo2-1b", "qwen3-0.6b", "llama-8b"])
def test_blocks_of_every_geometry_are_those_that_are_counted(make_job, geometry):
    settings = replace(make_job("unwrapped").settings, geometry=geometry, device="meta")
    assert len(Subject(settings, longest=64).layers) == 2


def test_kernels_are_not_those_of_experts(make_job):
    job = make_job("kernels")
    with pytest.raises(SkippedError, match="this geometry has experts"):
        CONTENDERS["kernels"](replace(job, settings=replace(job.settings, geometry="olmoe-1b-7b")))


def test_a_geometry_whose_products_are_not_counted_is_refused(make_job, monkeypatch):
    monkeypatch.setattr("benchmarks.harness.geometry._UNGATED", ("llama",))
    with pytest.raises(ValueError, match="a block of this geometry has 98,304 weights in matrix products, and FLOPs"):
        CONTENDERS["unwrapped"](make_job("unwrapped"))


def test_what_is_frozen_beside_adapters_has_four_flops_and_not_six():
    config = make_config("llama-8b", tokens=1024, blocks=None)
    whole, adapted = make_shape(config, Scope.STEP), make_shape(config, Scope.STEP, rank=16)
    own = 32 * sum(one.size for one in whole.linears) + 128_256 * 4096
    thin = 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * (4096 + 14336))
    assert whole.model_flops(1024) - adapted.model_flops(1024) == (2 * own - 6 * thin) * 1024


def test_adapters_that_peft_does_not_put_beside_all_products_are_refused(make_job):
    settings = replace(make_job("unwrapped").settings, geometry="olmoe-1b-7b", device="meta", lora=4)
    with pytest.raises(ValueError, match=r"--lora 4: .* which experts and products joined into one are not"):
        Subject(settings, longest=64)


def products(job):
    """FLOPs of matrix products in one step."""
    contender = CONTENDERS[job.contender](job)
    contender.start(job.lengths[0])
    contender.step()
    with FlopCounterMode(display=False) as counter:
        contender.step()
    counts = counter.get_flop_counts()["Global"]
    return contender, sum(flops for op, flops in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize(("geometry", "lora"), [("tiny", None), ("gpt-7b-tp8", None), ("tiny", 4)])
def test_a_step_has_the_products_of_the_formula(make_job, geometry, lora):
    job = make_job("unwrapped", blocks=1)
    contender, found = products(replace(job, settings=replace(job.settings, geometry=geometry, lora=lora)))
    attention = 6 * contender.subject.shape.attention_width * 64**2
    assert found == contender.model_flops(64) - attention


@pytest.mark.parametrize("geometry", ["tiny", "gpt-7b-tp8"])
def test_every_second_product_that_is_run_again_is_what_rows_say(make_job, geometry):
    def job(name):
        made = make_job(name, blocks=1)
        return replace(made, settings=replace(made.settings, geometry=geometry))

    _, once = products(job("unwrapped"))
    contender, found = products(job("selective-mm"))
    assert 0 < found - once == contender.recomputed_flops(64) < contender.subject.shape.rerun_flops(64, attention=False)


@pytest.mark.parametrize("name", ["selective+compile", "selective-mm+compile"])
def test_a_compiled_backward_runs_again_what_rows_say(make_job, monkeypatch, name):
    """With the compiler's partition of the graph, and without the code that it would write."""
    monkeypatch.setitem(compiled._OPTIONS, "backend", "aot_eager_decomp_partition")
    _, once = products(make_job("unwrapped"))
    contender, found = products(make_job(name))
    assert 0 < found - once == contender.recomputed_flops(64)


def test_products_that_are_joined_or_of_experts_are_not_said_to_be_run_again(make_job):
    for more in ({"geometry": "olmoe-1b-7b"}, {"geometry": "tiny", "lora": 4}):
        made = make_job("selective-mm")
        settings = replace(made.settings, device="meta", **more)
        assert CONTENDERS["selective-mm"](replace(made, settings=settings)).recomputed_flops(64) is None


@pytest.mark.parametrize(
    ("name", "lora"),
    [("checkpoint", None), ("checkpoint", 4), ("selective", None), ("selective", 4), ("save_on_cpu", None)],
)
def test_what_is_run_again_is_what_rows_say(make_job, name, lora):
    def job(name):
        made = make_job(name)
        return replace(made, settings=replace(made.settings, lora=lora))

    _, once = products(job("unwrapped"))
    contender, found = products(job(name))
    again = contender.subject.shape.rerun_flops(64, attention=False)
    assert found - once == again
    attention = 0 if name == "selective" else 2 * 2 * contender.subject.shape.attention_width * 64**2
    assert contender.recomputed_flops(64) == again + attention
