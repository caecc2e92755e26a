"""What a step asks for at other lengths than those recorded, and where that lives."""

from dataclasses import replace

import pytest

from memo_runtime.arena.lengths import Sample, fitted, length_of, longest_of_bucket, pair_of
from memo_runtime.arena.solving import Solved
from memo_runtime.planning.layout import layout_fault, plan_layout
from memo_runtime.traces.trace import Phase, Span, Trace, TraceRequest


def sample(tokens, *, before=0, weight=4000, handles=(7, 9)):
    """A step that makes something per token, something of fixed size, and a result that it leaves behind."""
    there = tuple(TraceRequest(i, 7 + before, 5_000_000, 0) for i in range(before))
    requests = (
        TraceRequest(before, before + 3, 100 + 6 * tokens, 0),
        TraceRequest(before + 1, before + 5, weight, 1),
        TraceRequest(before + 2, before + 4, 4 * tokens, 0),
        TraceRequest(before + 6, before + 7, 2 * tokens, 0),
    )
    span = Span(Phase.STEP, "", before, before + 7)
    trace = Trace(ticks=before + 7, requests=(*there, *requests), spans=(span,))
    assert trace.fault() is None
    return Sample(tokens=tokens, trace=trace, handles=handles)


def sizes(trace):
    return [request.size for request in trace.requests]


@pytest.mark.parametrize("tokens", [1, 333, 1000, 1250, 1500, 4096])
def test_two_lengths_say_what_all_others_ask_for(tokens):
    pair = pair_of(sample(1500, before=2), sample(1000))
    assert (pair.short.tokens, pair.long.tokens) == (1000, 1500)
    assert sizes(pair.at(tokens)) == sizes(sample(tokens, before=2).trace)


def test_nothing_vanishes_where_sizes_are_not_in_proportion():
    long = sample(1500)
    steep = replace(long.trace.requests[0], size=100_000_000)
    pair = pair_of(sample(1000), replace(long, trace=replace(long.trace, requests=(steep, *long.trace.requests[1:]))))
    assert pair.at(10).requests[0].size == 1


@pytest.mark.parametrize("tokens", [1000, 1001, 1400, 2048])
def test_addresses_of_the_longest_serve_every_length(tokens):
    pair = pair_of(sample(1000), sample(1500))
    layout = plan_layout(pair.at(2048), seconds=0.5, threads=1)
    solved = Solved(rows=layout.rows, placed=layout.placed, peak=layout.peak, lower_bound=layout.lower_bound,
                    resident_bytes=layout.resident_bytes, seconds=layout.seconds)  # fmt: skip
    here = fitted(solved, pair.at(tokens))
    assert [row.size for row in here.rows] == [100 + 6 * tokens, 4000, 4 * tokens]
    assert [row.offset for row in here.rows] == [row.offset for row in solved.rows]
    assert layout_fault(here.rows, here.peak) is None


def other_life(one):
    requests = one.trace.requests
    swapped = (replace(requests[0], upper=4), requests[1], replace(requests[2], upper=3), requests[3])
    return replace(one, trace=replace(one.trace, requests=swapped))


def bare(one):
    """Without the second request, which is small and does not grow."""
    a, _, c, d = one.trace.requests
    requests = (replace(a, upper=2), replace(c, lower=1, upper=3), replace(d, lower=4, upper=5))
    return replace(one, trace=replace(one.trace, ticks=5, requests=requests, spans=(Span(Phase.STEP, "", 0, 5),)))


@pytest.mark.parametrize("bare_one", ["short", "long"])
def test_small_requests_may_come_and_go_with_the_length(bare_one):
    short, long = sample(300_000), sample(600_000)
    pair = pair_of(bare(short), long) if bare_one == "short" else pair_of(short, bare(long))
    expected = sizes((sample if bare_one == "short" else lambda tokens: bare(sample(tokens)))(450_000).trace)
    assert sizes(pair.at(450_000)) == expected


@pytest.mark.parametrize(
    "other",
    [
        sample(1000),
        sample(1500, weight=3999),
        sample(1500, handles=(7, 8)),
        other_life(sample(1500)),
        bare(sample(400_000)),
        replace(sample(1500), trace=Trace(ticks=0, requests=(), spans=(Span(Phase.STEP, "", 0, 0),))),
    ],
    ids=["one length", "smaller where longer", "another stream", "another order", "mostly small ones", "nothing"],
)
def test_other_programs_are_no_pair(other):
    assert pair_of(sample(1000), other) is None
    assert pair_of(other, sample(1000)) is None


def test_buckets_are_eighths_of_an_octave():
    tops = [longest_of_bucket(tokens) for tokens in range(1, 70_000)]
    assert all(tokens <= top <= 1.125 * tokens + 1 for tokens, top in enumerate(tops, start=1))
    assert tops == sorted(tops)
    assert all(longest_of_bucket(top) == top for top in set(tops))
    assert longest_of_bucket(131_072) == 131_072
    assert longest_of_bucket(20_000) == 20_480
    assert len({longest_of_bucket(tokens) for tokens in range(20_000, 131_073)}) <= 24


def test_the_length_of_a_batch_is_what_its_shapes_share():
    assert length_of(((1, 512), (1, 512), (3,))) == (512, ((1, -1), (1, -1), (3,)))
    assert length_of(((2, 40, 64), (40,))) == (40, ((2, -1, 64), (-1,)))
    assert length_of(((4,),)) == (0, ((4,),))
    assert length_of(()) == (0, ())
