"""Blocks by tiles without a GPU: the bytes of a capture on this machine, and seconds from the work of its programs."""

import json
from dataclasses import replace

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import memo_runtime as memo
from memo_runtime.config import make_settings
from memo_runtime.machines.catalogue import find_machine
from memo_runtime.offline.fusion import fused_work
from memo_runtime.offline.planning import plan_at, with_placement
from memo_runtime.offline.profile import study_model
from memo_runtime.offline.subject import subject_named, subject_of
from memo_runtime.offline.work import WorkMeter
from memo_runtime.records import Executor

H100 = find_machine("h100-80gb")
TINY = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1 << 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(TINY))
    return study_model(subject_named(str(path), dtype=torch.float32), H100)


def test_bytes_are_those_that_a_run_profiles(study):
    transformers = pytest.importorskip("transformers")
    fields = {key: value for key, value in TINY.items() if key != "model_type"}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **fields))
    ids = torch.randint(512, (1, 64))
    measured = memo.profile(model, {"input_ids": ids, "labels": ids, "use_cache": False}, tiles=True)
    offline = study.at(4096, tiles=True).profile
    for here, there in zip(offline.blocks, measured.blocks, strict=True):
        for what in ("stash", "resident", "products", "again_flops", "saved_flops", "chained"):
            assert getattr(here.tiled, what) == getattr(there.tiled, what), what
        # Offline programs are those of a GPU, compiled; here they run operator by operator.
        for one, other in zip(here.tiled.forward, there.tiled.forward, strict=True):
            assert replace(one, tile=other.tile) == other
            assert one.tile.exact(4096) <= other.tile.exact(4096)
        # A CPU's attention shows no workspace; 4 heads of 16 have one in float32, a row sum, and keys for each of them.
        pairs = zip(here.tiled.backward, there.tiled.backward, strict=True)
        beside = {one.full.linear - other.full.linear for one, other in pairs}
        assert beside == {0.0, 4 * (64 + 4 + 2 * 64)}
    # So host bytes of the same choices are equal as well.
    knobs = {"policy": "tiled", "tile": 512, "alpha": 0.5, "seq_len": 4096, "keep_last": 1}
    plans = [memo.plan(one, budget="2GiB", host_budget="1TB", **knobs) for one in (offline, measured)]
    assert plans[0].forecast.host_bytes == plans[1].forecast.host_bytes > 0
    assert plans[0].forecast.recomputed_flops == plans[1].forecast.recomputed_flops > 0


def test_tiles_are_looked_at_once_and_for_every_length(study):
    short, long = (study.at(tokens, tiles=True).profile.blocks[0].tiled for tokens in (1 << 14, 1 << 16))
    assert study.tiles("model.layers.0") is study.tiles("model.layers.0")
    assert short.forward == long.forward
    assert long.forward_seconds.linear == short.forward_seconds.linear > 0
    assert long.backward_seconds.exact(1 << 16) > long.forward_seconds.exact(1 << 16)
    assert study.at(1 << 14).profile.blocks[0].tiled is None


def test_inputs_are_made_from_the_block_below_where_host_memory_is_short(study):
    offline = study.at(1 << 16, tiles=True).profile
    assert [block.tiled.chained for block in offline.blocks] == [False, True]
    knobs = {"policy": "tiled", "tile": 8192, "alpha": 0.0, "keep_last": 0, "budget": "2GiB"}
    whole = memo.plan(offline, **knobs, host_budget="1TB")
    less = memo.plan(offline, **knobs, host_budget=whole.forecast.host_bytes - 1)
    assert [(block.from_below, block.for_above) for block in less.blocks] == [(False, True), (True, False)]
    assert less.forecast.host_bytes < whole.forecast.host_bytes


def test_attention_gets_slower_where_the_machine_says_so(study):
    def per_pair(tokens):
        return study.at(tokens, tiles=True).profile.blocks[0].tiled.forward_seconds.quadratic

    assert per_pair(1 << 14) == per_pair(1 << 17) < per_pair(1 << 18) < per_pair(1 << 19) == per_pair(1 << 20)


def test_ranks_add_what_they_exchange(study):
    two = study_model(study.subject, H100, gpus=2)
    one, half = (one.at(1 << 15, tiles=True).profile.blocks[0].tiled for one in (study, two))
    assert half.forward[0].full.linear > one.forward[0].full.linear
    assert half.forward_seconds.quadratic == pytest.approx(2 * one.forward_seconds.quadratic)
    assert half.forward_seconds.linear > one.forward_seconds.linear


def test_a_plan_by_tiles_has_addresses(study):
    offline = study.at(1 << 17)
    plan = with_placement(plan_at(offline, make_settings(policy="tiled", budget="3GiB")), offline)
    assert {block.executor for block in plan.blocks} == {Executor.TILED}
    names = {row.id for row in plan.placement}
    assert {"tiles forward model.layers.0", "tiles early model.layers.1", "tiles middle model.layers.1"} <= names
    arena = max(row.offset + row.size for row in plan.placement)
    states = plan.profile.allocated_bytes + plan.profile.states.optimizer
    assert arena + states == pytest.approx(plan.forecast.peak_bytes, rel=0.1)


def test_a_block_that_cannot_run_by_tiles_says_why():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(16, 16)

        def forward(self, x):
            return x + self.up(torch.roll(x, 1, 1))

    with torch.device("meta"):
        model = nn.Sequential(*(Shifted() for _ in range(2)))
        batch = ((torch.empty(1, 64, 16, requires_grad=True),), {})
    block = study_model(subject_of("shifted", model, batch), H100).at(4096, tiles=True).profile.blocks[0]
    assert block.tiled is None
    assert "aten.roll" in block.tiled_reason


def traced(function, *shapes) -> fx.Graph:
    return make_fx(function, tracing_mode="fake")(*(torch.empty(shape) for shape in shapes)).graph


def test_a_run_of_elementwise_operators_reads_and_writes_once():
    size = 4 * 8 * 16
    work = fused_work(traced(lambda x: ((x * 2).sin() + x).cos(), (8, 16)))
    assert (work.matmul, work.traffic) == (0, 2 * size)


def test_a_product_ends_a_kernel():
    # One kernel before it: x in, 2 x out. One behind: the product and x in, the result out.
    work = fused_work(traced(lambda x, w: (x * 2) @ w + x, (8, 16), (16, 16)))
    assert work.matmul == 2 * 8 * 16 * 16
    assert work.traffic == 5 * 4 * 8 * 16


def test_views_cost_nothing():
    work = fused_work(traced(lambda x, w: (x.t().reshape(8, 16) @ w).view(16, 8), (8, 16), (16, 16)))
    assert work.traffic == 2 * 4 * 8 * 16  # reshape copies
    assert fused_work(traced(lambda x: x.t().unsqueeze(0), (8, 16))).traffic == 0


def test_a_thin_product_reads_and_writes_as_fast_as_memory():
    tokens, width, rank = 512, 256, 16
    work = fused_work(traced(lambda x, a, b: x @ a @ b, (tokens, width), (width, rank), (rank, width)))
    assert work.matmul == 4 * tokens * width * rank
    first = tokens * width + width * rank + tokens * rank
    second = tokens * rank + rank * width + tokens * width
    assert work.traffic == 4 * (first + second)
    # Of others it is in the rate of products.
    assert fused_work(traced(lambda x, w: x @ w, (tokens, width), (width, width))).traffic == 0
    with WorkMeter() as meter, torch.device("meta"):
        _ = torch.empty(tokens, width) @ torch.empty(width, rank)
    assert meter.take().traffic == 4 * first
