"""A trace: every request for memory of a run, in the order in which the allocator saw them.

Time is counted in events. Each tick is one allocation or one free, so that lifetimes alone give the exact
sequence back, which is what the simulator replays:

    tick      0      1      2      3      4
    event   +a     +b     -a     +c     -b          a: [0, 2)  b: [1, 4)  c: [3, 5)

Lifetimes are half-open; what is never freed ends at ``ticks``. A span is a stretch of the run, such as the
forward of one block; marks sit between ticks, so a span [2, 4) holds the events 2 and 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum


class Phase(StrEnum):
    """What a span is."""

    STEP = "step"  # one whole training step
    FORWARD = "forward"  # of a block
    RERUN = "rerun"  # of a block, inside its backward
    BACKWARD = "backward"  # of a block: from the gradient of its result to that of its input
    OPTIMIZER = "optimizer"


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """``size`` bytes, as requested, allocated at event ``lower`` and free again from event ``upper`` on."""

    lower: int
    upper: int
    size: int
    stream: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """The events [lower, upper) of one phase; ``block`` is "" where the phase belongs to none."""

    phase: Phase
    block: str
    lower: int
    upper: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What PyTorch's own allocator counted over the same run.

    ``allocated_peak`` counts rounded blocks, ``reserved_peak`` segments, both in bytes; ``retries`` how often it gave
    back its cache and asked the device again; ``num_segments`` those that it held at the end.
    """

    allocated_peak: int
    reserved_peak: int
    retries: int
    num_segments: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests of a run in order of allocation, and its spans in order of their begin.

    Attributes:
        ticks: number of events. streams are numbered as they appear, 0 first.
        releases: ticks before which the program gave all cached memory back (``torch.cuda.empty_cache``).
        segments: (address, bytes) of everything that the device gave, in the order in which it was asked; addresses
            count from the lowest. Empty where they are not known. They decide between free blocks of one size.
        measured: of a run on a device; None where no allocator was asked.
        expandable: the run had expandable segments. capacity_bytes: what the device had for it, 0 if unknown.
        provenance: words on how the trace came about (model, policy, tokens, torch, device, date, ...).
    """

    ticks: int
    requests: tuple[TraceRequest, ...]
    spans: tuple[Span, ...] = ()
    releases: tuple[int, ...] = ()
    segments: tuple[tuple[int, int], ...] = ()
    measured: Measured | None = None
    expandable: bool = False
    capacity_bytes: int = 0
    provenance: dict[str, str] = field(default_factory=dict)

    def events(self) -> Iterator[tuple[int, bool]]:
        """(index of the request, whether it is allocated) for every tick in order."""
        at: list[tuple[int, bool]] = [(-1, False)] * self.ticks
        for index, request in enumerate(self.requests):
            at[request.lower] = (index, True)
            if request.upper < self.ticks:
                at[request.upper] = (index, False)
        return iter(at)

    def steps(self) -> tuple[Span, ...]:
        """The spans of whole steps."""
        return tuple(span for span in self.spans if span.phase is Phase.STEP)

    def inside(self, window: Span) -> tuple[Span, ...]:
        """Spans that lie within ``window``, itself left out."""
        return tuple(s for s in self.spans if s is not window and window.lower <= s.lower and s.upper <= window.upper)

    def fault(self) -> str | None:
        """What cannot be true of this trace, naming the field; None if all is well."""
        seen = bytearray(self.ticks)
        for index, request in enumerate(self.requests):
            if request.size < 0 or request.stream < 0:
                return f"requests[{index}] has size {request.size} and stream {request.stream}; both are at least 0"
            if not 0 <= request.lower < request.upper <= self.ticks:
                return f"requests[{index}] lives [{request.lower}, {request.upper}) and there are {self.ticks} ticks"
            for tick in (request.lower, request.upper):
                if tick < self.ticks and seen[tick]:
                    return f"requests[{index}] has its event at tick {tick}, where another one is"
                if tick < self.ticks:
                    seen[tick] = 1
        if not all(seen):
            return f"tick {seen.index(0)} is no request's"
        for index, span in enumerate(self.spans):
            if not 0 <= span.lower <= span.upper <= self.ticks:
                return f"spans[{index}] is [{span.lower}, {span.upper}) and there are {self.ticks} ticks"
        for index, (start, size) in enumerate(self.segments):
            if start < 0 or size < 1:
                return f"segments[{index}] has address {start} and size {size}; they are at least 0 and 1"
        for index, tick in enumerate(self.releases):
            if not 0 <= tick <= self.ticks:
                return f"releases[{index}] is {tick} and there are {self.ticks} ticks"
        return None


@dataclass(slots=True)
class TraceBuilder:
    """Collects allocations, frees and marks as they happen, and numbers them at the end."""

    _events: list[tuple[int, bool]] = field(default_factory=list)
    _before: list[int] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)
    _streams: list[int] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)
    _open: list[tuple[Phase, str, int]] = field(default_factory=list)
    _spans: list[tuple[Phase, str, int, int]] = field(default_factory=list)
    _releases: list[int] = field(default_factory=list)
    _segments: list[tuple[int, int]] = field(default_factory=list)

    def allocate(self, size: int, stream: int = 0, *, before: bool = False) -> int:
        """A new request; ``before``: it was there when recording began. Returns its number for ``free``."""
        number = len(self._sizes)
        self._sizes.append(size)
        self._streams.append(self._numbers.setdefault(stream, len(self._numbers)))
        if before:
            self._before.append(number)
        else:
            self._events.append((number, True))
        return number

    @property
    def stream_handles(self) -> tuple[int, ...]:
        """What the streams were called by who told of them; stream 0 of the trace first."""
        return tuple(self._numbers)

    def free(self, number: int) -> None:
        """Request ``number`` is free from now on."""
        self._events.append((number, False))

    def release(self) -> None:
        """The program gives all cached memory back."""
        if self._releases[-1:] != [len(self._events)]:
            self._releases.append(len(self._events))

    def segment(self, address: int, size: int) -> None:
        """The device gave a segment."""
        self._segments.append((address, size))

    def begin(self, phase: Phase, block: str = "") -> None:
        """A span begins."""
        self._open.append((phase, block, len(self._events)))

    def end(self, phase: Phase, block: str = "") -> None:
        """The span that began last with these words ends; one that never began is left out."""
        for at in range(len(self._open) - 1, -1, -1):
            if self._open[at][:2] == (phase, block):
                _, _, lower = self._open.pop(at)
                self._spans.append((phase, block, lower, len(self._events)))
                return

    def build(
        self,
        *,
        measured: Measured | None = None,
        expandable: bool = False,
        capacity_bytes: int = 0,
        provenance: dict[str, str] | None = None,
    ) -> Trace:
        """The trace so far; spans that did not end are left out."""
        events = [*((number, True) for number in self._before), *self._events]
        shift, ticks = len(self._before), len(events)
        lower, upper = [0] * len(self._sizes), [ticks] * len(self._sizes)
        for tick, (number, allocates) in enumerate(events):
            (lower if allocates else upper)[number] = tick
        requests = [
            TraceRequest(*values) for values in zip(lower, upper, self._sizes, self._streams, strict=True)
        ]
        spans = [Span(phase, block, a + shift, b + shift) for phase, block, a, b in self._spans]
        lowest = min((address for address, _ in self._segments), default=0)
        return Trace(
            ticks=ticks,
            requests=tuple(sorted(requests, key=lambda request: request.lower)),
            spans=tuple(sorted(spans, key=lambda span: (span.lower, -span.upper))),
            # Memory that ran short was given back by the allocator, not by the program.
            releases=() if measured and measured.retries else tuple(tick + shift for tick in self._releases),
            segments=tuple((address - lowest, size) for address, size in self._segments),
            measured=measured,
            expandable=expandable,
            capacity_bytes=capacity_bytes,
            provenance=dict(provenance or {}),
        )
