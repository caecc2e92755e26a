"""The simulator against what PyTorch's allocator itself counted when the committed traces were recorded."""

from pathlib import Path

import pytest

from memo_runtime.simulation.replay import simulate
from memo_runtime.traces.trace_file import load_trace

FOLDER = Path(__file__).parents[2] / "benchmarks" / "traces"
FILES = sorted(FOLDER.glob("*/*.json.gz"))


@pytest.mark.skipif(not FILES, reason="no trace of a device is committed yet")
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_peaks_are_those_of_the_device(file):
    trace = load_trace(file)
    found, measured = simulate(trace), trace.measured
    assert found.retries == measured.retries
    assert found.allocated_peak == pytest.approx(measured.allocated_peak, rel=0.005)
    assert found.reserved_peak == pytest.approx(measured.reserved_peak, rel=0.02)


def test_files_are_small():
    assert [path.name for path in FILES if path.stat().st_size >= 1 << 20] == []
