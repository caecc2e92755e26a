"""Lengths that never come back, of a program with padded scratch: placed of two of them, served by the arena."""

import random
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from memo_runtime.allocator.library import Counts
from memo_runtime.arena.lengths import Sample, longest_of_bucket, pair_of
from memo_runtime.arena.placing import Placement
from memo_runtime.arena.plan import by_size, check_arena_plan
from memo_runtime.arena.solving import Solved
from memo_runtime.planning.layout import plan_layout
from memo_runtime.traces.trace_file import load_trace
from memo_runtime.traces.windows import last_step
from tests.allocator.building import arena_test
from tests.arena.reductions import scratch
from tests.house.sources import ROOT
from tests.native.building import compiler

TRACE = ROOT / "benchmarks" / "traces" / "h100" / "llama-8b-4-recompute.json.gz"
RECORDED, COLUMNS = 16384, 4096


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    return arena_test(tmp_path_factory.mktemp("arena"), "-O1")


@pytest.fixture(autouse=True)
def a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="card"))


def at_length(trace, tokens):
    """The recorded step at another length: what grows with it, scratch of norms' gradients, and what does not grow."""

    def size(request):
        if request.size == scratch(RECORDED, COLUMNS):
            # Short steps sum up without any; the test keeps to those that have some.
            return scratch(tokens, COLUMNS)
        return request.size // RECORDED * tokens if request.size % RECORDED == 0 else request.size

    return replace(trace, requests=tuple(replace(r, size=size(r)) for r in trace.requests))


def sample(trace, tokens):
    return Sample(tokens=tokens, trace=at_length(trace, tokens), handles=tuple(range(8)))


def placed(pair, tokens):
    layout = plan_layout(by_size(pair.at(tokens)), seconds=1.0, threads=1)
    solved = Solved(rows=layout.rows, placed=layout.placed, peak=layout.peak, lower_bound=layout.lower_bound,
                    resident_bytes=layout.resident_bytes, seconds=layout.seconds)  # fmt: skip
    return Placement(tokens, pair.long, pair, solved)


def step(program, placement, trace, tokens):
    """One of ``tokens``, of which the placement learns: its share of bytes that could be served, bytes without room."""
    plan, asked = placement.plan(tokens, 0), at_length(trace, tokens)
    check_arena_plan(plan)
    bounds = plan.slot_bounds()
    lines = [f"arena {plan.size}"]
    lines += [f"loose {' '.join(map(str, (*slot, *both)))}" for slot, both in zip(plan.slots(), bounds, strict=True)]
    lines += ["begin"]
    window = last_step(asked)
    for tick, (index, allocates) in enumerate(asked.events()):
        if window.lower <= tick < window.upper:
            request = asked.requests[index]
            lines.append(f"alloc {index} {request.size} {request.stream}" if allocates else f"free {index}")
    said = "\n".join([*lines, "end", "misfits"])
    done = subprocess.run([str(program), "--drive"], input=said, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (requests, served, _, unplanned, occupied, _), (total, got, *misfits) = (
        [int(number) for number in line.split()] for line in done.stdout.splitlines()
    )
    counts = {"requests": requests, "served": served, "unplanned": unplanned, "occupied": occupied}
    counts = Counts(**dict.fromkeys(Counts.__dataclass_fields__, 0) | counts)
    without_room = placement.learn(tokens, plan, list(zip(misfits[::2], misfits[1::2], strict=True)), counts)
    return got / (total - sum(size for _, size, _ in plan.residents)), without_room


@pytest.mark.parametrize(
    ("recorded", "longest", "others"),
    [
        # Those of tests/gpu/test_allocator_lengths.py: multiples of 512 only tell nothing of smaller multiples.
        ((1024, 1536), 2048, (1999, 1025, 1780, 2047, 1281)),
        # Scratch of a reduction stops growing with the length at 4,224 tokens, and grows again from 67,584 on.
        ((4096, 8192), 8192, (4097, 5000, 8191)),
        ((32768, 65536), 65536, (32769, 50_000, 65_535, 40_001)),
    ],
    ids=["multiples of 512", "levels off", "the same at both"],
)  # fmt: skip
def test_lengths_between_and_above_are_served_whole(program, recorded, longest, others):
    trace = load_trace(TRACE)
    placement = placed(pair_of(*(sample(trace, tokens) for tokens in recorded)), longest_of_bucket(longest))
    for tokens in others:
        share, without_room = step(program, placement, trace, tokens)
        assert share >= 0.999, (tokens, share)
        assert without_room == 0


def test_what_grows_beyond_what_was_seen_is_placed_again(program):
    """A quarter and a half of the longest are recorded, as by the benchmark, and sizes bend between half and whole."""
    trace, longest, draw = load_trace(TRACE), 131_072, random.Random(0)
    pair = pair_of(sample(trace, 32_768), sample(trace, 65_536))
    share, without_room = step(program, placed(pair, longest), trace, longest)
    assert share >= 0.98
    assert without_room == 9 * scratch(longest, COLUMNS)
    again = placed(pair, longest)
    for tokens in (longest, *(draw.randint(20_000, longest) for _ in range(6))):
        share, without_room = step(program, again, trace, tokens)
        assert share >= 0.999, (tokens, share)
        assert without_room == 0
