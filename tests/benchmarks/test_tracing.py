import gzip
import io
import json

import pytest

from benchmarks.harness.table import run_table
from benchmarks.harness.tracing import copy_times, joined, shared
from benchmarks.harness.worker import walk
from tests.benchmarks.test_table import row


def event(cat, start, seconds, name="x"):
    return {"cat": cat, "ts": start * 1e6, "dur": seconds * 1e6, "name": name}


def test_copies_are_hidden_while_a_kernel_runs():
    events = [
        event("kernel", 0, 2),
        event("kernel", 1, 3),  # on another stream
        event("kernel", 5, 1),
        event("gpu_memcpy", 1, 2, "Memcpy DtoH (Device -> Pinned)"),
        event("gpu_memcpy", 3.5, 2, "Memcpy HtoD (Pinned -> Device)"),  # 4 to 5 alone
        event("gpu_memcpy", 4.5, 0.25, "Memcpy DtoH (Device -> Pinned)"),  # beside it
        event("gpu_memcpy", 8, 9, "Memcpy DtoD (Device -> Device)"),
        event("cpu_op", 0, 90),
        {"ph": "M", "name": "process_name"},
    ]
    assert copy_times(events) == pytest.approx({"copy_seconds": 4.0, "exposed_seconds": 1.0, "exposed_share": 0.25})
    assert copy_times(events[:3])["exposed_share"] is None


def test_spans():
    assert joined([(3, 4), (0, 1), (1, 2), (0.5, 0.7)]) == [(0, 2), (3, 4)]
    assert shared([(0, 2), (3, 6)], [(1, 4), (5, 9)]) == 3
    assert shared([], [(0, 1)]) == 0


def test_one_more_step_is_traced(make_job, tmp_path):
    out = io.StringIO()
    walk(make_job("unwrapped", (64,), traces=str(tmp_path / "new" / "run-unwrapped")), out)
    found = json.loads(out.getvalue())["details"]["trace"]
    assert found["file"] == "run-unwrapped-64.json.gz"
    with gzip.open(tmp_path / "new" / found["file"], "rt") as file:
        names = {one.get("name", "") for one in json.load(file)["traceEvents"]}
    assert "aten::mm" in names
    assert found["exposed_share"] is None


def test_a_run_names_its_traces_and_prints_their_copies(in_process, make_runner, tmp_path):
    runner = make_runner("unwrapped", "--traces", str(tmp_path), lengths="48")
    runner.run()
    assert in_process[-1].traces == str(tmp_path / "test-unwrapped")
    trace = {"file": "a.json.gz", "copy_seconds": 0.5, "exposed_seconds": 0.01, "exposed_share": 0.02}
    text = run_table([row("memo-tiled", 64, 1.0, details={"trace": trace}), row("kernels", 64, 1.0)])
    assert text.splitlines()[-1] == "memo-tiled at 64: 0.500 s of copies, 2.0% not hidden (a.json.gz)"
