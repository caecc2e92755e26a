"""Layouts of recorded steps: nothing alive together shares a byte, streams keep apart, blocks are placed once."""

import itertools
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from benchmarks.layout import main, reserved
from benchmarks.traces.cases import all_cases, shrunk
from benchmarks.traces.recording import record
from memo_runtime.errors import TraceError
from memo_runtime.planning.layout import ALIGNMENT, block_spans, plan_layout
from memo_runtime.recording.meta_attention import fused_attention_on_meta
from memo_runtime.recording.meta_scalars import PlainAnswers
from memo_runtime.simulation.replay import simulate
from memo_runtime.traces.trace import Phase, TraceBuilder
from memo_runtime.traces.trace_file import load_trace, save_trace
from memo_runtime.traces.windows import last_step, steady_trace
from tests.traces.samples import small_trace

COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks" / "traces").glob("*/*.json.gz"))


def case_named(name):
    return next(case for case in all_cases() if case.name == name)


def check(trace, layout):
    """By brute force, in the trace's own terms."""
    step = last_step(trace)
    arena_of = {arena.stream: arena for arena in layout.arenas}
    live, at = {}, {index: row.offset for index, row in zip(layout.placed, layout.rows, strict=True)}
    for tick, (index, allocates) in enumerate(trace.events()):
        if index not in at:
            continue
        request = trace.requests[index]
        assert step.lower <= tick < step.upper
        if not allocates:
            del live[index]
            continue
        start, end = at[index], at[index] + request.size
        arena = arena_of[request.stream]
        assert arena.base <= start, "a stream leaves its part"
        assert end <= arena.base + arena.size
        assert start % ALIGNMENT == 0
        assert all(end <= low or high <= start for low, high in live.values())
        live[index] = start, end
    assert not live
    ranges = sorted((arena.base, arena.base + arena.size) for arena in layout.arenas)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
    assert layout.lower_bound <= layout.peak <= layout.flat_peak
    assert layout.peak <= 1.005 * layout.lower_bound


def test_a_step_by_hand():
    trace = small_trace()
    layout = plan_layout(trace, threads=1)
    check(trace, layout)
    # Two saved tensors and one transient; the second stream's 512 bytes have a place of their own.
    assert [(arena.stream, arena.size) for arena in layout.arenas] == [(0, 2 * 2048 + 4096), (1, 512)]
    assert layout.resident_bytes == 1024  # 1,000 bytes were there before, rounded
    assert layout.arenas[0].num_blocks == 4
    assert layout.arenas[0].num_distinct == 1  # within a block, forward and backward ask for the same
    assert (layout.rows[0].lower, layout.rows[0].upper, layout.rows[0].size) == (0, 2, 4096)


def test_what_outlives_the_step_is_not_planned():
    builder = TraceBuilder()
    before = builder.allocate(1024)
    builder.begin(Phase.STEP)
    builder.free(before)
    builder.free(builder.allocate(2048))
    builder.allocate(4096)
    builder.end(Phase.STEP)
    layout = plan_layout(builder.build(), threads=1)
    assert [row.size for row in layout.rows] == [2048]
    assert layout.resident_bytes == 4096


def test_a_trace_without_a_step_is_refused():
    with pytest.raises(TraceError, match="no span of phase 'step'"):
        plan_layout(TraceBuilder().build())


def test_spans_that_overlap_are_no_blocks():
    builder = TraceBuilder()
    builder.begin(Phase.STEP)
    builder.begin(Phase.FORWARD, "outer")
    builder.begin(Phase.FORWARD, "inner")
    builder.allocate(1)
    builder.end(Phase.FORWARD, "inner")
    builder.allocate(1)
    builder.end(Phase.FORWARD, "outer")
    builder.end(Phase.STEP)
    trace = builder.build()
    assert [span.block for span in block_spans(trace, last_step(trace))] == ["outer"]


@pytest.mark.parametrize("name", ["llama-8b-4-replay", "qwen3-moe-4-unwrapped", "vit-l-recompute"])
def test_real_steps_on_cpu(name):
    trace = record(shrunk(case_named(name)), torch.device("cpu"), {})
    check(trace, plan_layout(trace, threads=1))


def test_a_full_size_step_on_meta_and_what_the_plan_saves():
    with fused_attention_on_meta(), PlainAnswers():
        trace = record(case_named("llama-8b-4-recompute"), torch.device("meta"), {})
    layout = plan_layout(trace, threads=1)
    check(trace, layout)
    assert sum(arena.num_distinct for arena in layout.arenas) < len(block_spans(trace, last_step(trace)))
    bytes_reserved = reserved(trace, layout)
    assert bytes_reserved["reserved_planned"] < bytes_reserved["reserved_expandable"]
    assert bytes_reserved["reserved_planned"] < bytes_reserved["reserved_default"]
    assert bytes_reserved["reserved_planned"] >= layout.peak + layout.resident_bytes


def test_the_steady_trace_is_the_step_with_its_residents():
    trace = small_trace()
    steady, originals = steady_trace(trace, last_step(trace))
    assert steady.fault() is None
    assert [steady.requests[i].size for i in range(len(originals))] == [trace.requests[o].size for o in originals]
    assert simulate(steady).allocated_peak == simulate(trace).allocated_peak


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * (at % 2)) for at, path in enumerate(COMMITTED)],
    ids=lambda path: path.name.removesuffix(".json.gz"),
)  # fmt: skip
def test_committed_traces(path):
    trace = load_trace(path)
    check(trace, plan_layout(trace, threads=1, seconds=3.0))


def test_a_step_whose_sizes_no_recording_has():
    """The recorded ViT step with every size of its own random factor: flat, it is 2.4 % above the bound."""
    recorded = next(path for path in COMMITTED if "vit-l-recompute" in path.name)
    trace, factors, random = load_trace(recorded), {}, Random(3)
    requests = tuple(
        replace(r, size=max(1, int(r.size * factors.setdefault(r.size, random.uniform(0.7, 1.4)))))
        for r in trace.requests
    )
    layout = plan_layout(replace(trace, requests=requests), threads=1)
    check(replace(trace, requests=requests), layout)
    assert layout.flat_peak > 1.02 * layout.lower_bound


def test_the_command_writes_a_row_per_trace(tmp_path, capsys):
    save_trace(small_trace(), tmp_path / "hand.json.gz")
    assert main([str(tmp_path), "--out", str(tmp_path / "rows.jsonl")]) == 0
    assert '"trace": "hand"' in (tmp_path / "rows.jsonl").read_text()
    assert "ratio 1.00000" in capsys.readouterr().out
    assert main([str(tmp_path / "none"), "--out", str(tmp_path / "rows.jsonl")]) == 2
