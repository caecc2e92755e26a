"""The simulator against what PyTorch's allocator itself counted when the committed traces were recorded."""

from pathlib import Path

import pytest

from memo_runtime.simulation.replay import simulate
from memo_runtime.traces.trace_file import load_trace

FOLDER = Path(__file__).parents[2] / "benchmarks" / "traces"
FILES = sorted(FOLDER.glob("*/*.json.gz"))


#: Reserved peaks that the simulator misses by more than 2 %, and by how much; nobody knows why yet.
MISSED = {"qwen3-moe-4-recompute": "3.6 % too low", "vit-l-recompute": "3.3 % too high"}


def recorded(path):
    """One recorded trace, marked where it is known to be missed."""
    name = path.name.removesuffix(".json.gz")
    missed = [pytest.mark.xfail(strict=True, reason=MISSED[name])] if name in MISSED else []
    return pytest.param(path, id=name, marks=missed)


@pytest.mark.parametrize("file", [recorded(path) for path in FILES])
def test_peaks_are_those_of_the_device(file):
    trace = load_trace(file)
    found, measured = simulate(trace), trace.measured
    assert found.retries == measured.retries
    assert found.allocated_peak == pytest.approx(measured.allocated_peak, rel=0.005)
    assert found.reserved_peak == pytest.approx(measured.reserved_peak, rel=0.02)


def test_files_are_small():
    assert [path.name for path in FILES if path.stat().st_size >= 1 << 20] == []
