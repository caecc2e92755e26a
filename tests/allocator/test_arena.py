"""The arena in C++, with memory errors and undefined behaviour made visible; and on what the planner makes."""

import subprocess

import pytest

from memo_runtime.allocator.library import NATIVE
from memo_runtime.arena.plan import by_size
from memo_runtime.planning.layout import plan_layout
from memo_runtime.traces.trace import Phase, Span
from memo_runtime.traces.trace_file import load_trace
from memo_runtime.traces.windows import last_step
from tests.allocator.building import SANITIZERS, arena_test
from tests.house.sources import ROOT
from tests.native.building import compiler
from tests.native.test_sanitizers import supported

TRACES = sorted((ROOT / "benchmarks" / "traces" / "h100").glob("*.json.gz"))


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The test program, with sanitizers where the compiler has them."""
    folder = tmp_path_factory.mktemp("arena")
    flags = [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"]
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    return arena_test(folder, "-O0", *(flags if supported(folder, flags) else []))


def test_the_arena_keeps_its_promises(program):
    done = subprocess.run([str(program), "60000"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "ok\n"


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "operations"), [(("-O2",), 10_000_000), (("-O1", "-fsanitize=thread"), 1_000_000)])
def test_many_operations(tmp_path, flags, operations):
    if compiler() is None or not supported(tmp_path, list(flags)):
        pytest.skip(f"needs a C++ compiler with {' '.join(flags)}")
    program = arena_test(tmp_path, *flags)
    done = subprocess.run([str(program), str(operations)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def requests_of(trace, window, *, without=0):
    """The step's events as lines; every ``without``-th request does not come."""
    lines = ["begin"]
    for tick, (index, allocates) in enumerate(trace.events()):
        request = trace.requests[index]
        if window.lower <= tick < window.upper and not (without and index % without == 0):
            lines.append(f"alloc {index} {request.size} {request.stream}" if allocates else f"free {index}")
    return [*lines, "end"]


def served(program, lines):
    command = [str(program), "--drive"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [[int(number) for number in line.split()] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("path", TRACES[:1] + TRACES[-1:], ids=lambda path: path.name.partition(".")[0])
def test_what_outlives_a_step_is_left_in_its_place(program, path):
    """Steps that begin in the middle of a forward: activations and gradients outlive them."""
    trace = load_trace(path)
    ends = [(step.lower + step.upper) // 2 for step in trace.steps()[-2:]]
    window = Span(Phase.STEP, "", *ends)
    layout = plan_layout(by_size(trace), step=window, seconds=1.0, threads=1)
    slots = [
        (row.lower, row.upper, row.size, row.offset, trace.requests[index].stream)
        for row, index in zip(layout.rows, layout.placed, strict=True)
    ]
    outliving = [r for r in trace.requests if r.size and window.lower <= r.lower < window.upper <= r.upper]
    slots += [(r.lower - window.lower, window.upper, r.size, NATIVE, r.stream) for r in outliving]
    lines = [f"arena {layout.peak}", *(f"slot {' '.join(map(str, slot))}" for slot in sorted(slots))]
    rest = Span(Phase.STEP, "", ends[1], trace.steps()[-1].upper)
    first, second = served(program, [*lines, *requests_of(trace, window), *requests_of(trace, rest)])
    assert len(outliving) > 20
    # Requests, served, displaced, unplanned, occupied.
    assert first[:5] == [len(slots), len(layout.rows), 0, 0, 0]
    assert second[1:5] == [second[0], 0, 0, 0]


@pytest.mark.parametrize("path", TRACES[:1] + TRACES[-1:], ids=lambda path: path.name.partition(".")[0])
def test_a_recorded_step_is_served_as_the_planner_placed_it(program, path):
    trace = load_trace(path)
    window = last_step(trace)
    layout = plan_layout(trace, seconds=1.0, threads=1)
    streams = [trace.requests[index].stream for index in layout.placed]
    lines = [f"arena {layout.peak}"]
    lines += [
        f"slot {row.lower} {row.upper} {row.size} {row.offset} {stream}"
        for row, stream in zip(layout.rows, streams, strict=True)
    ]
    step = requests_of(trace, window)
    again, fewer = served(program, [*lines, *step, *step, *requests_of(trace, window, without=50)])[-2:]
    requests, found, displaced, _, occupied, peak = again
    # What outlives the step is not planned; a few such requests may be taken for planned ones of their size.
    residents = sum(window.lower <= r.lower < window.upper <= r.upper for r in trace.requests)
    assert len(layout.rows) - found <= residents
    assert found >= 0.97 * len(layout.rows), (requests, found, displaced, occupied)
    assert peak <= layout.peak
    # One of fifty missing: the step goes on by plan.
    assert fewer[1] >= 0.9 * fewer[0], fewer
