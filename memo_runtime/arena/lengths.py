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

from memo_runtime.arena.plan import SMALL
from memo_runtime.arena.solving import Solved
from memo_runtime.traces.trace import Trace, TraceRequest
from memo_runtime.traces.windows import last_step

#: Lengths of buckets in an octave: a placement is at most an eighth longer than the longest step so far.
_BUCKETS = 8

#: Share of the bytes of a step that large requests must have, where they alone are compared.
_MOSTLY = 0.98

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
    """One program recorded at two lengths.

    Attributes:
        sizes: of the requests of the last step of ``long``, in order, what they are in ``short``; their own where that
            is not known, which then holds at all lengths.
    """

    short: Sample
    long: Sample
    sizes: tuple[int, ...]

    def at(self, tokens: int) -> Trace:
        """What the step asks for at ``tokens``, which may be longer or shorter than both."""
        window = last_step(self.long.trace)
        first = next((i for i, r in enumerate(self.long.trace.requests) if r.lower >= window.lower), 0)
        over, apart = tokens - self.short.tokens, self.long.tokens - self.short.tokens
        requests = list(self.long.trace.requests)
        for index, before in enumerate(self.sizes, start=first):
            size = before + -(-(requests[index].size - before) * over // apart)
            requests[index] = replace(requests[index], size=max(size, min(1, before)))
        return replace(self.long.trace, requests=tuple(requests))


def pair_of(one: Sample, other: Sample) -> Pair | None:
    """Both, if they are one program at two lengths: the same requests in the same order, none smaller where longer.

    Small requests may come and go with the length, such as scratch of a reduction, where the large ones are the same.
    """
    short, long = (one, other) if one.tokens < other.tokens else (other, one)
    if short.tokens == long.tokens or not any(_made(short.trace)):
        return None
    for least in (0, SMALL):
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
    """``solved`` with the sizes of ``trace`` at its addresses, none of them larger than those it was made for."""
    sizes = (trace.requests[index].size for index in solved.placed)
    return replace(solved, rows=tuple(replace(row, size=size) for row, size in zip(solved.rows, sizes, strict=True)))
