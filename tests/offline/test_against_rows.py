"""Offline forecasts against what was measured on an H100: four llama-8b blocks, forward and backward."""

import json

import pytest
import torch

from benchmarks.harness.geometry import make_config
from benchmarks.harness.subject import BlockStack
from memo_runtime.config import longest_tile, make_settings
from memo_runtime.machines.catalogue import find_machine
from memo_runtime.offline.profile import study_model
from memo_runtime.offline.subject import subject_of
from memo_runtime.planning.planner import make_plan
from memo_runtime.planning.sheet import Sheet
from memo_runtime.planning.tiles import by_tiles
from tests.house.sources import ROOT

#: A block of 8B is tried on the CPU for it.
pytestmark = pytest.mark.slow

ROWS = [json.loads(line) for line in (ROOT / "benchmarks/results/harness_8b_h100.jsonl").read_text().splitlines()]
MEASURED = {(row["contender"], row["seq_len"]): row for row in ROWS if row["status"] == "ok"}
LENGTHS = (16384, 32768, 65536)


#: Rows by tiles: tokens, and blocks whose stash stays on the device. Their peaks are of a runtime that is gone.
TILED = {
    row["seq_len"]: row
    for row in map(
        json.loads, (ROOT / "benchmarks/results/harness_8b_budget_h100.jsonl").read_text().splitlines()
    )
    if row["run"] == "issue4-8b-final" and row["contender"] == "memo-auto@selective"
}
RESIDENT = {16384: 2, 32768: 4, 65536: 2, 131072: 1}


@pytest.fixture(scope="module")
def study():
    transformers = pytest.importorskip("transformers")
    config = make_config("llama-8b", tokens=1 << 17, blocks=4)
    config.vocab_size = 1
    with torch.device("meta"):
        whole = transformers.AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        hidden = torch.empty(1, 64, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        stack = BlockStack(whole.layers, whole.rotary_emb)
    return study_model(subject_of("blocks", stack, ((hidden,), {})), find_machine("h100-80gb"))


@pytest.fixture(scope="module")
def profile(study):
    return study.at(16384).profile


@pytest.mark.parametrize("tokens", LENGTHS)
def test_peak_and_time_of_the_unwrapped_blocks(profile, tokens):
    row = MEASURED["unwrapped", tokens]
    settings = make_settings(policy="none", budget="1TB")
    forecast = make_plan(profile, settings, tokens={0: tokens}).forecast
    # The harness has no optimizer.
    assert forecast.peak_bytes - profile.states.optimizer == pytest.approx(row["peak_allocated"], rel=0.05)
    assert forecast.step_seconds == pytest.approx(row["step_seconds"], rel=0.05)


@pytest.mark.parametrize("tokens", [*LENGTHS, 131072])
def test_time_of_full_recomputation(profile, tokens):
    block = profile.blocks[0]
    seconds = 4 * (2 * block.forward_seconds.exact(tokens) + block.backward_seconds.exact(tokens))
    assert seconds == pytest.approx(MEASURED["checkpoint", tokens]["step_seconds"], rel=0.05)


@pytest.mark.parametrize("tokens", RESIDENT)
def test_blocks_by_tiles(study, tokens):
    row, profile = TILED[tokens], study.at(tokens, host_bytes=1 << 40, tiles=True).profile
    assert row["details"]["executors"] == {"tiled": 4}
    sheet = Sheet(profile, (tokens,) * 4)
    alpha = row["details"]["alpha"][0]
    forecast = sheet.forecast(by_tiles(sheet, alpha, RESIDENT[tokens], longest_tile(profile.rows)))
    assert forecast.host_bytes == row["details"]["host_bytes"]
    assert forecast.recomputed_flops == row["recomputed_flops"]
    assert forecast.step_seconds == pytest.approx(row["step_seconds"], rel=0.05)
