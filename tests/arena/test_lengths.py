"""What a step asks for at other lengths than those recorded, and where that lives."""

from dataclasses import replace

import pytest

from memo_runtime.arena.lengths import Sample, fitted, length_of, longest_of_bucket, pair_of
from memo_runtime.arena.solving import Solved
from memo_runtime.planning.layout import layout_fault, plan_layout
from memo_runtime.traces.trace import Phase, Span, Trace, TraceRequest
from tests.arena.reductions import scratch


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


def padded(tokens, *, columns=4096):
    """A step whose second request is scratch of a reduction."""
    one = sample(tokens)
    a, _, c, d = one.trace.requests
    return replace(one, trace=replace(one.trace, requests=(a, TraceRequest(1, 5, scratch(tokens, columns), 0), c, d)))


def room(pair, tokens):
    """Of each request of the step where ``tokens`` are placed."""
    return [request.size for request in pair.at(tokens).requests]


def bounds(pair, tokens, top):
    found = zip(sizes(pair.at(tokens)), room(pair, top), strict=True)
    return pair.bounds(tokens, {at: (min(both), both[1]) for at, both in enumerate(found)})


def test_scratch_that_is_padded_has_bounds_until_a_step_says_what_it_is():
    pair = pair_of(padded(1024, columns=512), padded(1536, columns=512))
    for tokens in (1025, 1100, 1536, 1999, 2047):
        expected = sizes(padded(tokens, columns=512).trace)
        for (least, most), size in zip(bounds(pair, tokens, 2048), expected, strict=True):
            assert least <= size <= most
    assert pair.learn(1025, {1: scratch(1025, 512)})
    assert not pair.learn(1025, {1: scratch(1025, 512)})
    for tokens in (1026, 1281, 1999, 30_000):
        assert sizes(pair.at(tokens)) == sizes(padded(tokens, columns=512).trace)


def test_what_was_as_expected_is_certain_until_it_is_not():
    pair = pair_of(sample(1024), sample(1536))
    expected = sizes(pair.at(1100))
    assert bounds(pair, 1100, 2048)[0][0] < expected[0] < bounds(pair, 1100, 2048)[0][1]
    assert not pair.confirm(1280, {0, 1, 2, 3})  # whatever is rounded up is the same there
    assert pair.confirm(1101, {0, 1, 2, 3})
    assert bounds(pair, 1100, 2048) == [(size, size) for size in expected]
    pair.learn(1203, {0: 9000})
    assert bounds(pair, 1100, 2048)[0][0] < expected[0]
    assert pair.at(1203).requests[0].size == 9000


def constant(one, cells):
    """With a large request more, which is as large at every length, and many small ones that are not."""
    requests = [replace(r, lower=2 * r.lower, upper=2 * r.upper) for r in one.trace.requests]
    more = [TraceRequest(2 * at + 1, 14, size, 0) for at, size in enumerate(cells)]
    both = sorted([*requests, *more], key=lambda r: r.lower)
    trace = Trace(ticks=14, requests=tuple(both), spans=(Span(Phase.STEP, "", 0, 14),))
    return replace(one, trace=trace)


def test_what_is_as_large_at_every_length_is_on_one_side_of_the_border():
    # Just below the border in the longer step, and beyond what that is in the shorter one.
    short, long = sample(10_000_000), sample(15_000_000)
    trace = pair_of(constant(short, [900_000]), constant(long, [900_000, 512])).at(12_000_000)
    expected = sizes(sample(12_000_000).trace)
    assert [size for size in sizes(trace) if size not in (900_000, 512)] == expected
