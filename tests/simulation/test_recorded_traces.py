"""The simulator against what PyTorch's allocator itself counted when the committed traces were recorded."""

from pathlib import Path

import pytest

from memo_runtime.simulation.caching_allocator import round_request
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_what_the_allocator_adds_to_large_tensors(path):
    """Nothing where sizes are multiples of 2 MiB, as with Llama and experts; a little with ViT's 197 tokens."""
    trace = load_trace(path)
    live = asked = 0
    for index, allocates in trace.events():
        size = trace.requests[index].size
        live += (round_request(size) if allocates else -round_request(size)) if size else 0
        asked = max(asked, live)
    added = trace.measured.allocated_peak - asked
    assert added == {"vit-l-recompute": 3_374_080, "vit-l-unwrapped": 24_502_272}.get(path.name.split(".")[0], 0)
    assert added < 0.002 * asked


def test_files_are_small():
    assert [path.name for path in FILES if path.stat().st_size >= 1 << 20] == []
