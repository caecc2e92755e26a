"""One step out of a trace, and what lives around it."""

from __future__ import annotations

from memo_runtime.errors import TraceError
from memo_runtime.traces.trace import Span, Trace, TraceRequest


def last_step(trace: Trace) -> Span:
    """The last whole step, which is the steadiest one.

    Raises:
        TraceError: no step is marked.
    """
    steps = trace.steps()
    if not steps:
        raise TraceError("the trace has no span of phase 'step': mark at least one training step when recording")
    return steps[-1]


def is_within(request: TraceRequest, window: Span) -> bool:
    """Whether the request is allocated and freed in ``window``."""
    return window.lower <= request.lower and request.upper < window.upper


def is_resident(request: TraceRequest, window: Span) -> bool:
    """Whether it is alive in ``window`` and outlives it on a side: weights, optimizer states, what is handed on."""
    alive = request.lower < window.upper and request.upper > window.lower
    return alive and not is_within(request, window)


def steady_trace(trace: Trace, window: Span) -> tuple[Trace, tuple[int, ...]]:
    """A trace of ``window`` alone, and which request of ``trace`` each of its requests is.

    What lives in it and began before is there from the start, in order of allocation; what outlives it is never freed.
    """
    kept = [
        index
        for index, request in enumerate(trace.requests)
        if request.lower < window.upper and request.upper > window.lower
    ]
    events = sorted(
        (tick, index, allocates)
        for index in kept
        for tick, allocates in ((trace.requests[index].lower, True), (trace.requests[index].upper, False))
        if allocates or tick < window.upper
    )
    lower: dict[int, int] = {}
    upper: dict[int, int] = {}
    for tick, (_, index, allocates) in enumerate(events):
        (lower if allocates else upper)[index] = tick
    requests = tuple(
        TraceRequest(lower[index], upper.get(index, len(events)), trace.requests[index].size,
                     trace.requests[index].stream)
        for index in kept
    )  # fmt: skip
    return Trace(ticks=len(events), requests=requests, expandable=trace.expandable), tuple(kept)
