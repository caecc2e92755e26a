"""Offline forecasts against whole training steps that were measured on an H100: three models, up to three lengths each.

Rows: python -m benchmarks.harness --scope step --geometry G --lengths 8K,16K,32K --contenders memo-swap,memo-recompute
"""

import functools
import json

import pytest

from benchmarks.harness.geometry import make_config
from memo_runtime.config import make_settings
from memo_runtime.machines.catalogue import find_machine
from memo_runtime.offline.profile import profile_offline
from memo_runtime.offline.subject import subject_named
from memo_runtime.planning.planner import make_plan
from tests.house.sources import ROOT

ROWS = [json.loads(line) for line in (ROOT / "benchmarks/results/forecast_h100.jsonl").read_text().splitlines()]


def case(row):
    """One row; the longer ones are left to the runs that take their time."""
    name = f"{row['geometry'].split('/')[-1].removesuffix('.json')} {row['contender']} {row['seq_len']}"
    return pytest.param(row, id=name, marks=[pytest.mark.slow] if row["seq_len"] > 8192 else [])


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """The offline profile of a geometry at a length."""
    pytest.importorskip("transformers")

    @functools.cache
    def profiled(geometry, tokens):
        path = tmp_path_factory.mktemp("config") / "config.json"
        path.write_text(json.dumps(make_config(geometry, tokens=tokens, blocks=None).to_dict()))
        subject = subject_named(str(path), tokens=tokens)
        return profile_offline(subject, find_machine("h100-80gb"), tokens=tokens, host_bytes=1 << 40).profile

    return profiled


def test_the_rows_are_three_models_at_three_lengths():
    assert {row["status"] for row in ROWS} == {"ok"}
    swapped = {(row["geometry"], row["seq_len"]) for row in ROWS if row["contender"] == "memo-swap"}
    assert len({geometry for geometry, _ in swapped}) == 3
    assert len(swapped) == 9


@pytest.mark.parametrize("row", [case(row) for row in ROWS])
def test_peak_and_host_bytes(row, profile, monkeypatch):
    monkeypatch.chdir(ROOT)  # rows name configs by their path in the repository
    settings = make_settings(policy=row["contender"].removeprefix("memo-"), budget="80GB", host_budget="1TB")
    assert row["config"]["batch_size"] == 1
    forecast = make_plan(profile(row["geometry"], row["seq_len"]), settings).forecast
    assert forecast.host_bytes == row["details"]["host_bytes"]
    assert forecast.bytes_to_host == row["details"]["bytes_to_host"]
    # Attention's seeds are a few bytes larger on the device.
    assert forecast.bytes_kept == pytest.approx(row["details"]["bytes_kept"], abs=1024)
    # Launches take time that nobody counts.
    assert 0.69 < forecast.step_seconds / row["step_seconds"] < 0.96
    # Asked for are 5 %.
    assert forecast.peak_bytes == pytest.approx(row["peak_allocated"], rel=0.01)
