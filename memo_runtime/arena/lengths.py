"""Steps of one program at other lengths than those recorded: what each request is there, and where it lives.

A step asks for the same things in the same order at every length; only sizes differ, each by so many bytes a token or
a begun multiple of some tokens (``arena.sizes``). Two recorded lengths give those, and so the requests at any other:

    tokens       1,000 (recorded)   1,500 (recorded)   1,700         2,048 (placed)
    request 7    4,096              6,096              6,896         8,288 bytes at offset 512

Addresses are those of one length, the longest of a bucket: what is smaller there has room, since sizes only grow with
the length. So one placement serves every length up to its own, in one arena. What a step then asks for that is of
another size says more of sizes at all lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from memo_runtime.arena.plan import SMALL
from memo_runtime.arena.sizes import Growth, growth_of
from memo_runtime.arena.solving import Solved
from memo_runtime.placement import PlacedRequest
from memo_runtime.traces.trace import Trace, TraceRequest
from memo_runtime.traces.windows import last_step

#: Lengths of buckets in an octave: a placement is at most an eighth longer than the longest step so far.
_BUCKETS = 8

#: Sizes above which large requests are compared, if those from the first on are not the same ones: what does not grow
#: with the length and is just below a border at one length is beyond it at the other.
_BORDERS = (0, *(SMALL * halves // 2 for halves in (2, 3, 4, 6, 8, 12, 16)))

#: Lengths that are remembered of a request that had another size than expected.
_MOST_SEEN = 32

#: A length that is no multiple of this shows which requests are rounded up.
_TELLING = 16

#: Share of the bytes of a step that large requests must have, where they alone are compared.
_MOSTLY = 0.98

Shapes = tuple[tuple[int, ...], ...]
_Answer = TypeVar("_Answer")


def length_of(shapes: Shapes) -> tuple[int, Shapes]:
    """(tokens of a sequence, ``shapes`` without them): the second dimension of the first tensor that has two.

    Batches that differ in it alone are one program at other lengths. (0, ``shapes``) where there is none.
    """
    tokens = next((shape[1] for shape in shapes if len(shape) > 1), 0)
    return tokens, tuple(tuple(-1 if size == tokens else size for size in shape) for shape in shapes)


def longest_of_bucket(tokens: int) -> int:
    """The longest length of the bucket of ``tokens``: 8 to 16 times a power of two."""
    step = max(1, 1 << max(0, tokens.bit_length() - _BUCKETS.bit_length()))
    return -(-tokens // step) * step


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A recorded step of ``tokens``, the last one of ``trace``; ``handles`` are the CUDA handles of its streams."""

    tokens: int
    trace: Trace
    handles: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class Pair:
    """One program recorded at two lengths.

    Attributes:
        sizes: of the requests of the last step of ``long``, in order, what they are in ``short``; their own where that
            is not known, which then holds at all lengths.
        seen: bytes of requests of the trace of ``long`` at other lengths, where they were not as expected. sure: those
            that were as expected at a length that would have shown it.
    """

    short: Sample
    long: Sample
    sizes: tuple[int, ...]
    seen: dict[int, dict[int, int]] = field(default_factory=dict)
    sure: set[int] = field(default_factory=set)

    @property
    def first(self) -> int:
        """The first request of the step in the trace of ``long``."""
        window = last_step(self.long.trace)
        return next((i for i, r in enumerate(self.long.trace.requests) if r.lower >= window.lower), 0)

    def at(self, tokens: int) -> Trace:
        """What the step asks for at ``tokens``, which may be longer or shorter than both."""
        requests, sizes = list(self.long.trace.requests), _Each(tokens, Growth.at)
        for index, before in enumerate(self.sizes, start=self.first):
            size = sizes.of(self._growth(index, before))
            known = requests[index]
            if size != known.size:  # not by replace(), which is slow: this comes before every step of a new length
                requests[index] = TraceRequest(known.lower, known.upper, max(size, min(1, before)), known.stream)
        return replace(self.long.trace, requests=tuple(requests))

    def bounds(self, tokens: int, rooms: Mapping[int, tuple[int, int]]) -> list[tuple[int, int]]:
        """Least and most bytes of requests at ``tokens``; ``rooms``: of each the size that is expected and its room."""
        first, found, each = self.first, [], _Each(tokens, Growth.bounds)
        for index, (size, room) in rooms.items():
            least, most = size, size
            if index not in self.sure:
                lower, upper = each.of(self._growth(index, self.sizes[index - first]))
                least, most = max(1, min(size, lower)), min(room, max(size, room if upper is None else upper))
            found.append((least, most))
        return found

    def _growth(self, index: int, before: int) -> Growth:
        size = self.long.trace.requests[index].size
        if index not in self.seen:
            return growth_of(((self.short.tokens, before), (self.long.tokens, size)))
        points = {self.short.tokens: before, self.long.tokens: size} | self.seen[index]
        return growth_of(tuple(sorted(points.items())))

    def learn(self, tokens: int, found: Mapping[int, int]) -> bool:
        """Requests had ``found`` bytes at ``tokens``; whether that is new."""
        new = False
        for index, size in found.items():
            known = self.seen.setdefault(index, {})
            # What differs from step to step has room for the largest.
            if size > known.get(tokens, 0):
                known[tokens], new = size, True
                if len(known) > _MOST_SEEN:
                    del known[next(iter(known))]
            self.sure.discard(index)
        return new

    def confirm(self, tokens: int, indices: set[int]) -> bool:
        """Requests had the sizes that were expected at ``tokens``; whether that is new."""
        new = indices - self.sure if tokens % _TELLING else set()
        self.sure |= new
        return bool(new)


class _Each(Generic[_Answer]):
    """What ``ask`` says of growths at ``tokens``, asked once of those that are the same: most requests grow alike."""

    def __init__(self, tokens: int, ask: Callable[[Growth, int], _Answer]) -> None:
        self._tokens, self._ask = tokens, ask
        self._known: dict[int, tuple[Growth, _Answer]] = {}

    def of(self, growth: Growth) -> _Answer:
        """The answer."""
        known = self._known.get(id(growth))
        if known is None:
            known = self._known[id(growth)] = growth, self._ask(growth, self._tokens)
        return known[1]


def pair_of(one: Sample, other: Sample) -> Pair | None:
    """Both, if they are one program at two lengths: the same requests in the same order, none smaller where longer.

    Small requests may come and go with the length, such as scratch of a reduction, where the large ones are the same.
    """
    short, long = (one, other) if one.tokens < other.tokens else (other, one)
    if short.tokens == long.tokens or not any(_made(short.trace)):
        return None
    for least in _BORDERS:
        sizes = _sizes_in(short, long, least)
        if sizes is not None:
            return Pair(short=short, long=long, sizes=sizes)
    return None


def _sizes_in(short: Sample, long: Sample, least: int) -> tuple[int, ...] | None:
    """Of the requests of ``long``, what they are in ``short``, by those above ``least`` in ``long``; None: others."""
    in_short = _step(short, least * short.tokens // long.tokens)
    in_long = _step(long, least)
    if in_short.order != in_long.order or in_short.streams != in_long.streams:
        return None
    if any(sum(step.sizes) < _MOSTLY * sum(r.size for r in _made(one.trace))
           for one, step in ((short, in_short), (long, in_long))):  # fmt: skip
        return None
    sizes = [request.size for request in _made(long.trace)]
    for index, before in zip(in_long.indices, in_short.sizes, strict=True):
        if before > sizes[index] or bool(before) != bool(sizes[index]):
            return None
        sizes[index] = before
    return tuple(sizes)


@dataclass(frozen=True, slots=True)
class _Step:
    """The requests of a step above a size: their places in it, sizes, streams, and in what order they come and go."""

    indices: tuple[int, ...]
    sizes: tuple[int, ...]
    streams: tuple[int, ...]
    order: tuple[tuple[int, bool], ...]


def _step(sample: Sample, least: int) -> _Step:
    chosen = [(i, r) for i, r in enumerate(_made(sample.trace)) if r.size > least or not least]
    upper = last_step(sample.trace).upper
    comes = [(r.lower, at, True) for at, (_, r) in enumerate(chosen)]
    goes = [(r.upper, at, False) for at, (_, r) in enumerate(chosen) if r.upper < upper]
    return _Step(
        tuple(i for i, _ in chosen),
        tuple(r.size for _, r in chosen),
        tuple(sample.handles[r.stream] for _, r in chosen),
        tuple((at, made) for _, at, made in sorted([*comes, *goes])),
    )


def _made(trace: Trace) -> Iterator[TraceRequest]:
    """The requests of the last step, in order."""
    window = last_step(trace)
    return (r for r in trace.requests if window.lower <= r.lower < window.upper)


def fitted(solved: Solved, trace: Trace) -> Solved:
    """``solved`` with the sizes of ``trace`` at its addresses, as far as there is room."""
    pairs = zip(solved.rows, solved.placed, strict=True)
    sizes = ((row, trace.requests[index].size) for row, index in pairs)
    rows = (
        row
        if size >= row.size
        else PlacedRequest(id=row.id, lower=row.lower, upper=row.upper, size=size, offset=row.offset)
        for row, size in sizes
    )
    return replace(solved, rows=tuple(rows))
