"""The value: ticks, spans, what it refuses."""

from dataclasses import replace

import pytest

from memo_runtime.traces.trace import Phase, Span, TraceBuilder, TraceRequest
from tests.traces.samples import random_trace, small_trace


def test_lifetimes_are_the_sequence_of_events():
    builder = TraceBuilder()
    a = builder.allocate(10)
    b = builder.allocate(20)
    builder.free(a)
    builder.allocate(30)
    builder.free(b)
    trace = builder.build()
    assert trace.requests == (TraceRequest(0, 2, 10), TraceRequest(1, 4, 20), TraceRequest(3, 5, 30))
    assert list(trace.events()) == [(0, True), (1, True), (0, False), (2, True), (1, False)]
    assert trace.fault() is None


def test_what_was_there_before_comes_first_and_shifts_spans():
    builder = TraceBuilder()
    builder.begin(Phase.STEP)
    builder.allocate(1)
    builder.end(Phase.STEP)
    builder.allocate(2, before=True)
    trace = builder.build()
    assert trace.requests == (TraceRequest(0, 2, 2), TraceRequest(1, 2, 1))
    assert trace.spans == (Span(Phase.STEP, "", 1, 2),)


def test_streams_are_numbered_as_they_appear():
    builder = TraceBuilder()
    for stream in (140_000, 0, 140_000):
        builder.allocate(1, stream)
    assert [request.stream for request in builder.build().requests] == [0, 1, 0]


def test_spans_that_do_not_end_or_begin_are_left_out():
    builder = TraceBuilder()
    builder.begin(Phase.FORWARD, "a")
    builder.end(Phase.FORWARD, "b")
    assert builder.build().spans == ()


def test_spans_within_a_step():
    trace = small_trace()
    (step,) = trace.steps()
    assert [(span.phase, span.block) for span in trace.inside(step)] == [
        (Phase.FORWARD, "a"), (Phase.FORWARD, "b"), (Phase.BACKWARD, "b"), (Phase.BACKWARD, "a"),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_built_traces_have_no_fault(seed):
    assert random_trace(seed).fault() is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ticks": 99}, "is no request's"),
        ({"ticks": 3}, "there are 3 ticks"),
        ({"spans": (Span(Phase.STEP, "", 4, 3),)}, r"spans\[0\]"),
        ({"requests": (TraceRequest(0, 2, -1),)}, "size -1"),
        ({"requests": (TraceRequest(0, 2, 1), TraceRequest(0, 3, 1))}, "where another one is"),
    ],
)
def test_what_cannot_be_true_is_found(change, said):
    with pytest.raises(AssertionError, match=said):
        assert replace(small_trace(), **change).fault() is None, replace(small_trace(), **change).fault()
