"""Where each byte of a step lives: from a trace to addresses, on two levels (MEMO, arXiv 2407.12117, section 4.2).

What a step allocates and frees again is placed in one arena; what outlives the step (weights, gradients that are
kept, optimizer states) stays with PyTorch's allocator. Requests that live within the forward or the backward of one
block are placed once per distinct block (level 1), everything else with whole blocks (level 2); memo_solver then
flattens both and repairs what rectangles lose.

    arena   | stream 0: level 2 of blocks and what lives across | stream 1 | ...      base of stream 1 = size of 0

Streams never share a byte: each has a part of the arena of its own. So a free on one stream never has to be waited
for on another, and the plan needs no ordering between streams beyond what the program has.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memo_runtime.placement import PlacedRequest
from memo_runtime.traces.trace import Phase, Span, Trace
from memo_runtime.traces.windows import is_resident, is_within, last_step

if TYPE_CHECKING:
    from memo_solver.bilevel import BilevelSolution, Block, Iteration

#: Addresses are multiples of this, as PyTorch's are.
ALIGNMENT = 512
_DIRECTIONS = {Phase.FORWARD: "forward", Phase.BACKWARD: "backward"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamArena:
    """The part [base, base + size) of the arena that one stream has to itself.

    Attributes:
        lower_bound: no placement of this stream's requests is lower. flat_peak: of the flat heuristic, blocks
            forgotten. rectangle_peak: of level 2 with blocks as full rectangles, as MEMO plans.
        num_blocks: forwards and backwards that level 1 knew, of which ``num_distinct`` differ.
    """

    stream: int
    base: int
    size: int
    lower_bound: int
    flat_peak: int
    rectangle_peak: int
    num_blocks: int
    num_distinct: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Addresses for one step.

    Attributes:
        rows: every planned request: id, lifetime in the step's own ticks, size as requested, offset in the arena.
        placed: its index in the trace, in the order of ``rows``.
        resident_bytes: most bytes alive in the step that are not planned, since they outlive it.
        seconds: that planning took.
    """

    rows: tuple[PlacedRequest, ...]
    placed: tuple[int, ...]
    arenas: tuple[StreamArena, ...]
    resident_bytes: int
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes of the arena."""
        return sum(arena.size for arena in self.arenas)

    @property
    def lower_bound(self) -> int:
        """No arena in which streams keep apart is smaller."""
        return sum(arena.lower_bound for arena in self.arenas)

    @property
    def flat_peak(self) -> int:
        """What the flat heuristic alone needs."""
        return sum(arena.flat_peak for arena in self.arenas)

    @property
    def rectangle_peak(self) -> int:
        """What MEMO's two levels need without repair."""
        return sum(arena.rectangle_peak for arena in self.arenas)


def plan_layout(trace: Trace, *, step: Span | None = None, seconds: float = 10.0, threads: int | None = None) -> Layout:
    """Place what ``step`` (the last one of ``trace``, if not given) allocates and frees again.

    Args:
        seconds: limit for the solver, shared by streams in proportion to their requests.
        threads: of the solver; all cores if not given.

    Raises:
        TraceError: no step is marked.
    """
    begun = time.monotonic()
    window = last_step(trace) if step is None else step
    chosen = [i for i, r in enumerate(trace.requests) if r.size and is_within(r, window)]
    streams = sorted({trace.requests[index].stream for index in chosen})
    base, arenas, offsets = 0, [], {}
    for stream in streams:
        own = [index for index in chosen if trace.requests[index].stream == stream]
        blocks, iteration = layout_problem(trace, window, own)
        solved = _solve(blocks, iteration, seconds * len(own) / len(chosen), threads)
        placement = solved.solution.placement
        assert placement is not None, "without a capacity there is always one"
        for name, offset in placement.by_id().items():
            offsets[int(name.rsplit("/", 1)[-1])] = base + offset * ALIGNMENT
        arenas.append(_arena(stream, base, solved, len(blocks)))
        base += arenas[-1].size
    return Layout(
        rows=tuple(_row(trace, window, index, offsets[index]) for index in chosen),
        placed=tuple(chosen),
        arenas=tuple(arenas),
        resident_bytes=_resident_peak(trace, window),
        seconds=time.monotonic() - begun,
    )


def layout_fault(rows: Sequence[PlacedRequest], capacity: int) -> str | None:
    """What is wrong with ``rows`` in an arena of ``capacity`` bytes, by the independent validator; else None."""
    from memo_solver.errors import InputError
    from memo_solver.records import Problem, Request
    from memo_solver.validator import find_violation

    try:
        requests = tuple(
            Request(row.id, row.lower, row.upper, -(-row.size // ALIGNMENT) * ALIGNMENT, ALIGNMENT) for row in rows
        )
        found = find_violation(Problem(requests=requests), [row.offset for row in rows], capacity=capacity)
    except InputError as error:
        return str(error)
    if found is None:
        return None
    return f"{found.rule.value}: {found.detail or ' and '.join(found.request_ids)}"


def layout_problem(trace: Trace, window: Span, chosen: Sequence[int]) -> tuple[list[Block], Iteration]:
    """The two levels for the requests ``chosen`` of ``trace``; ids are their indices, sizes in units of 512 bytes."""
    from memo_solver.bilevel import Block, Iteration
    from memo_solver.records import Request

    spans = block_spans(trace, window)
    inside: list[list[Request]] = [[] for _ in spans]
    across, at = [], 0
    for index in chosen:  # in order of allocation, as the spans are
        request = trace.requests[index]
        units = -(-request.size // ALIGNMENT)
        while at < len(spans) and spans[at].upper <= request.lower:
            at += 1
        span = spans[at] if at < len(spans) else None
        if span is not None and is_within(request, span):
            inside[at].append(Request(str(index), request.lower - span.lower, request.upper - span.lower, units))
        else:
            across.append(Request(str(index), request.lower, request.upper, units))
    blocks = [
        Block(id=f"{_DIRECTIONS[s.phase]} {s.block}", lower=s.lower, upper=s.upper, requests=tuple(requests))
        for s, requests in zip(spans, inside, strict=True)
        if requests
    ]
    return blocks, Iteration(requests=tuple(across))


def block_spans(trace: Trace, window: Span) -> list[Span]:
    """Forwards and backwards of blocks in ``window`` that do not overlap, each block's first of either kind."""
    found: list[Span] = []
    seen: set[tuple[Phase, str]] = set()
    for span in trace.inside(window):
        free = not found or span.lower >= found[-1].upper
        if span.phase in _DIRECTIONS and free and (span.phase, span.block) not in seen:
            found.append(span)
            seen.add((span.phase, span.block))
    return found


def _solve(blocks: list[Block], iteration: Iteration, seconds: float, threads: int | None) -> BilevelSolution:
    from memo_solver.bilevel import solve_bilevel
    from memo_solver.params import SolveParams

    return solve_bilevel(blocks, iteration, SolveParams(time_limit_seconds=max(seconds, 0.1), num_threads=threads))


def _arena(stream: int, base: int, solved: BilevelSolution, num_blocks: int) -> StreamArena:
    peak, rectangle_peak = solved.solution.peak, solved.rectangle_peak
    assert peak is not None
    assert rectangle_peak is not None  # in units of the alignment: nothing is near 64 bits
    return StreamArena(
        stream=stream,
        base=base,
        size=peak * ALIGNMENT,
        lower_bound=solved.solution.lower_bound * ALIGNMENT,
        flat_peak=solved.flat_peak * ALIGNMENT,
        rectangle_peak=rectangle_peak * ALIGNMENT,
        num_blocks=num_blocks,
        num_distinct=solved.num_distinct_blocks,
    )


def _row(trace: Trace, window: Span, index: int, offset: int) -> PlacedRequest:
    request = trace.requests[index]
    return PlacedRequest(
        id=f"r{index}",
        lower=request.lower - window.lower,
        upper=request.upper - window.lower,
        size=request.size,
        offset=offset,
    )


def _resident_peak(trace: Trace, window: Span) -> int:
    """Most bytes of residents at any event of ``window``, each rounded as the allocator does."""
    changes: dict[int, int] = {}
    for request in trace.requests:
        if is_resident(request, window):
            size = -(-request.size // ALIGNMENT) * ALIGNMENT
            for tick, change in ((max(request.lower, window.lower), size), (request.upper, -size)):
                changes[tick] = changes.get(tick, 0) + change
    loads = itertools.accumulate(changes[tick] for tick in sorted(changes) if tick < window.upper)
    return max(loads, default=0)
