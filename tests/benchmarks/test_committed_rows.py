"""Committed rows agree with themselves: the step is the median of its seconds, and MFU is what its FLOPs say."""

import json
import statistics

import pytest

from tests.house.sources import ROOT

FILES = sorted((ROOT / "benchmarks" / "results").glob("harness_*.jsonl"))
#: Dense bf16 peaks of data sheets, FLOP/s.
PEAKS = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_row_agrees_with_itself(path):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    measured = [row for row in rows if row["status"] == "ok" and row.get("seconds")]
    assert measured or not path.name.startswith(("harness_step", "harness_8b_h200"))
    for row in measured:
        which = row["run"], row["contender"], row["seq_len"]
        assert row["step_seconds"] == pytest.approx(statistics.median(row["seconds"])), which
        assert row["n"] == len(row["seconds"]), which
        assert row["p20"] <= row["step_seconds"] <= row["p80"], which
        if row.get("mfu") is not None:
            flops = row["mfu"] * row["step_seconds"] * PEAKS[row["gpu"]]
            assert flops == pytest.approx(row["model_flops"], rel=1e-3), which
        assert row["peak_allocated"] <= row["peak_reserved"], which
