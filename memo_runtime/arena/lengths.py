"""Steps of one program at other lengths than those recorded: what each request is there, and where it lives.

A step asks for the same things in the same order at every length; only sizes differ, each by so many bytes a token. Two
recorded lengths give those, and so the requests at any other:

    tokens       1,000 (recorded)   1,500 (recorded)   1,700         2,048 (placed)
    request 7    4,096              6,096              6,896         8,288 bytes at offset 512

Addresses are those of one length, the longest of a bucket: what is smaller there has room, since sizes only grow with
the length. So one placement serves every length up to its own, in one arena.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from memo_runtime.arena.solving import Solved
from memo_runtime.traces.trace import Trace, TraceRequest
from memo_runtime.traces.windows import last_step

#: Lengths of buckets in an octave: a placement is at most an eighth longer than the longest step so far.
_BUCKETS = 8

Shapes = tuple[tuple[int, ...], ...]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One program recorded at two lengths."""

    short: Sample
    long: Sample

    def at(self, tokens: int) -> Trace:
        """What the step asks for at ``tokens``, which may be longer or shorter than both."""
        window = last_step(self.long.trace)
        first = next((i for i, r in enumerate(self.long.trace.requests) if r.lower >= window.lower), 0)
        made = list(_made(self.short.trace))
        over, apart = tokens - self.short.tokens, self.long.tokens - self.short.tokens
        requests = list(self.long.trace.requests)
        for index, before in enumerate(made, start=first):
            grown = (requests[index].size - before.size) * over
            size = before.size + -(-grown // apart)
            requests[index] = replace(requests[index], size=max(size, min(1, before.size)))
        return replace(self.long.trace, requests=tuple(requests))


def pair_of(one: Sample, other: Sample) -> Pair | None:
    """Both, if they are one program at two lengths: the same requests in the same order, none smaller where longer."""
    short, long = (one, other) if one.tokens < other.tokens else (other, one)
    if short.tokens == long.tokens:
        return None
    windows = last_step(short.trace), last_step(long.trace)
    if windows[0].upper - windows[0].lower != windows[1].upper - windows[1].lower:
        return None
    pairs = list(zip(_made(short.trace), _made(long.trace), strict=False))
    for a, b in pairs:
        lives = _life(a, windows[0].lower, windows[0].upper) == _life(b, windows[1].lower, windows[1].upper)
        same = lives and short.handles[a.stream] == long.handles[b.stream] and bool(a.size) == bool(b.size)
        if not same or a.size > b.size:
            return None
    return Pair(short=short, long=long)


def _made(trace: Trace) -> Iterator[TraceRequest]:
    """The requests of the last step, in order."""
    window = last_step(trace)
    return (r for r in trace.requests if window.lower <= r.lower < window.upper)


def _life(request: TraceRequest, lower: int, upper: int) -> tuple[int, int]:
    return request.lower - lower, min(request.upper, upper) - lower


def fitted(solved: Solved, trace: Trace) -> Solved:
    """``solved`` with the sizes of ``trace`` at its addresses, none of them larger than those it was made for."""
    sizes = (trace.requests[index].size for index in solved.placed)
    return replace(solved, rows=tuple(replace(row, size=size) for row, size in zip(solved.rows, sizes, strict=True)))
