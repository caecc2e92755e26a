"""Histories as the allocator writes them: marks are taken out, deferred frees count when they are done."""

import pytest

from memo_runtime.errors import TraceError
from memo_runtime.traces.history import MARK, MarkWords, read_history
from memo_runtime.traces.trace import Measured, Phase, Span, TraceRequest


def alloc(address, size, stream=0):
    return {"action": "alloc", "addr": address, "size": size, "stream": stream}


def freed(address, size=0, stream=0):
    return [
        {"action": kind, "addr": address, "size": size, "stream": stream}
        for kind in ("free_requested", "free_completed")
    ]


def mark(address):
    first, second = address, address + 512
    return [alloc(first, MARK[0]), alloc(second, MARK[1]), *freed(first), *freed(second)]


def test_marks_become_spans_and_leave_no_request():
    entries = [
        *mark(1 << 20),
        {"action": "segment_alloc", "addr": 0, "size": 2 << 20, "stream": 0},
        alloc(4096, 5000),
        *mark(1 << 20),
        *freed(4096),
        alloc(4096, 700, stream=3),
    ]
    words = [MarkWords(True, Phase.FORWARD, "a"), MarkWords(False, Phase.FORWARD, "a")]
    trace = read_history(entries, marks=words).build()
    assert trace.requests == (TraceRequest(0, 1, 5000, 0), TraceRequest(2, 3, 700, 1))
    assert trace.spans == (Span(Phase.FORWARD, "a", 0, 1),)
    assert trace.fault() is None


def test_a_free_that_waits_for_a_stream_counts_when_it_is_completed():
    requested, completed = freed(4096)
    trace = read_history([alloc(4096, 10), requested, alloc(8192, 20), completed]).build()
    assert trace.requests == (TraceRequest(0, 2, 10), TraceRequest(1, 3, 20))


def test_requests_of_one_of_the_sizes_of_a_mark_are_requests():
    trace = read_history([alloc(0, MARK[0]), alloc(512, 9), alloc(1024, MARK[1]), *freed(0)]).build()
    assert [request.size for request in trace.requests] == [MARK[0], 9, MARK[1]]


def test_what_is_in_use_at_the_start_was_there_before():
    alive = [{"address": 64, "requested_size": 100, "stream": 0}]
    trace = read_history([alloc(4096, 10), *freed(64)], alive=alive).build()
    assert trace.requests == (TraceRequest(0, 2, 100), TraceRequest(1, 3, 10))


def test_a_history_that_lost_its_beginning_is_refused():
    with pytest.raises(TraceError, match="never allocated"):
        read_history(freed(4096))
    with pytest.raises(TraceError, match="1 marks were made and 0"):
        read_history([alloc(1, 10)], marks=[MarkWords(True, Phase.STEP, "")])


def test_cached_memory_that_was_given_back_is_noted_once():
    gone = [{"action": "segment_free", "addr": n, "size": 2 << 20, "stream": 0} for n in (0, 1)]
    builder = read_history([alloc(4096, 10), *freed(4096), *gone, alloc(4096, 20)])
    assert builder.build().releases == (2,)


def test_memory_that_ran_short_was_not_given_back_by_the_program():
    builder = read_history([alloc(1, 1), {"action": "segment_unmap", "addr": 0, "size": 1, "stream": 0}])
    measured = Measured(allocated_peak=1, reserved_peak=1, retries=1, num_segments=1)
    assert builder.build(measured=measured).releases == ()


def test_segments_are_noted_in_the_order_in_which_the_device_gave_them():
    given = [{"action": "segment_alloc", "addr": at, "size": size, "stream": 0} for at, size in ((900, 20), (400, 2))]
    trace = read_history([given[0], alloc(900, 10), given[1], alloc(400, 1)]).build()
    assert trace.segments == ((500, 20), (0, 2))
    assert len(trace.requests) == 2
