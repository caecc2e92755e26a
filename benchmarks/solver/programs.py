"""Instances like a compiler's, by seed: tiles, ping-pong, few sizes, capacity equal to the peak load.

`cut_program`       a memory cut into tiles, often equal ones; thinned, trimmed and shortened away from
                    a few full moments.
`streamed_program`  an allocator's memory filled while time runs, from a short list of sizes and with
                    groups of equal tiles that end one after the other.

Both are cut from placements, so the capacity can be met.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from memo_solver import Problem, Request

UNIT = 512
"""Bytes; every size is a multiple of it."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a program is cut."""

    width: int = 400
    """Moments."""
    height: int = 2048
    """Units of capacity."""
    grain: int = 8
    """Units that every size is a multiple of."""
    equal: float = 0.35
    """Share of cuts into equal tiles."""
    loose: float = 0.0
    """Share of requests dropped, of requests trimmed and of requests shortened, away from full moments."""
    num_full: int = 3
    """Moments that stay full."""


STYLES = {
    "perfect": Style(),
    "2 % thinned": Style(loose=0.02),
    "5 % thinned": Style(loose=0.05),
    "15 % thinned": Style(loose=0.15, num_full=2),
    "30 % thinned": Style(loose=0.3, num_full=1),
    "fine, 5 % thinned": Style(width=1000, height=4096, grain=1, equal=0.15, loose=0.05),
    "coarse, 5 % thinned": Style(width=120, grain=64, loose=0.05),
}
STREAM_FILLS = {"streamed, full": 1.0, "streamed, 97 % refilled": 0.97}


def program(style: str, seed: int) -> Problem:
    """A program of 150 to 450 requests in one of the styles."""
    num_requests = random.Random(f"{style} {seed}").randint(150, 450)
    if style in STREAM_FILLS:
        return streamed_program(num_requests, seed=seed, fill=STREAM_FILLS[style])
    return cut_program(num_requests, STYLES[style], seed=seed)


Box = tuple[int, int, int, int]
"""Left, right (moments), bottom, top (units)."""


def cut_program(num_requests: int, style: Style, *, seed: int) -> Problem:
    """See the top of the file."""
    rng = random.Random(f"cut {num_requests} {seed} {style}")
    boxes: list[Box] = [(0, style.width, 0, style.height)]
    failures = 0
    while len(boxes) < num_requests * (1 + style.loose) and failures < 2000:
        at = max(rng.sample(range(len(boxes)), min(3, len(boxes))), key=lambda k: _area(boxes[k]))
        pieces = _cut(boxes[at], style, rng)
        failures += len(pieces) == 1
        boxes[at : at + 1] = pieces
    full = [rng.randrange(style.width) for _ in range(style.num_full)]
    kept = [piece for box in boxes if (piece := _loosened(box, full, style, rng)) is not None]
    rng.shuffle(kept)
    return _problem(kept)


def _area(box: Box) -> int:
    return (box[1] - box[0]) * (box[3] - box[2])


def _cut(box: Box, style: Style, rng: random.Random) -> list[Box]:
    left, right, bottom, top = box
    wide, grains = right - left, (top - bottom) // style.grain
    kind = rng.random() - style.equal
    if kind < 0 and grains >= 2:
        parts = next(p for p in range(rng.choice([2, 2, 3, 4, 4, 8]), 0, -1) if grains % p == 0)
        tall = (top - bottom) // parts
        return [(left, right, bottom + k * tall, bottom + (k + 1) * tall) for k in range(parts)]
    if kind < 0.15 and wide >= 4:
        times = [left, *sorted(rng.sample(range(left + 1, right), rng.choice([1, 2, 3]))), right]
        return [(a, b, bottom, top) for a, b in itertools.pairwise(times)]
    if kind < 0.3 and wide >= 3 and grains >= 3:
        x1, x2 = sorted(rng.sample(range(left + 1, right), 2))
        y1, y2 = (bottom + style.grain * y for y in sorted(rng.sample(range(1, grains), 2)))
        return [
            (left, x2, bottom, y1), (x2, right, bottom, y2), (x1, right, y2, top), (left, x1, y1, top),
            (x1, x2, y1, y2),
        ]  # fmt: skip
    if grains >= 2 and (wide < 2 or rng.random() < 0.5):
        y = bottom + style.grain * rng.randrange(1, grains)
        return [(left, right, bottom, y), (left, right, y, top)]
    if wide >= 2:
        x = rng.randrange(left + 1, right)
        return [(left, x, bottom, top), (x, right, bottom, top)]
    return [box]


def _loosened(box: Box, full: list[int], style: Style, rng: random.Random) -> tuple[int, int, int] | None:
    """(lower, upper, units) of what is left of a box; nothing changes at the full moments."""
    left, right, bottom, top = box
    units = top - bottom
    crossed = [time for time in full if left <= time < right]
    if not crossed:
        if rng.random() < style.loose:
            return None
        if rng.random() < style.loose and units > style.grain:
            grains = units // style.grain
            units = style.grain * rng.randint(max(1, grains // 2), grains)
    if rng.random() < style.loose:
        left = rng.randint(left, min(crossed, default=right - 1))
        right = rng.randint(max(crossed, default=left) + 1, right)
    return left, right, units


def streamed_program(num_requests: int, *, seed: int, fill: float, units: int = 2048) -> Problem:
    """See the top of the file; a hole is filled with probability `fill` at each moment."""
    rng = random.Random(f"streamed {num_requests} {seed} {fill} {units}")
    base = rng.choice([1, 2, 4, 8])
    shares = rng.sample([6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256], 8)
    sizes = sorted({units // share // base * base for share in shares} - {0})
    live: list[tuple[int, int, int]] = []  # (end, offset, units)
    placed: list[tuple[int, int, int]] = []  # (lower, upper, units)
    time = 0
    while len(placed) < num_requests:
        live = [entry for entry in live if entry[0] > time]
        for offset, hole in _holes(live, units):
            if rng.random() > fill:
                continue
            for at, size, life in _filling(offset, hole, sizes, rng):
                live.append((time + life, at, size))
                placed.append((time, time + life, size))
        time += 1
    cut = [(lower, min(upper, time), size) for lower, upper, size in placed]
    rng.shuffle(cut)
    return _problem(cut)


def _holes(live: list[tuple[int, int, int]], units: int) -> list[tuple[int, int]]:
    holes, end = [], 0
    for _, offset, size in sorted(live, key=lambda entry: entry[1]):
        if offset > end:
            holes.append((end, offset - end))
        end = offset + size
    return [*holes, (end, units - end)] if end < units else holes


def _filling(offset: int, hole: int, sizes: list[int], rng: random.Random) -> list[tuple[int, int, int]]:
    """(offset, units, life) of requests that fill a hole: single ones, and groups of equal tiles."""
    filling = []
    while hole > 0:
        fitting = [size for size in sizes if size <= hole] or [hole]
        size, life = rng.choice(fitting), _life(rng)
        count = min(rng.choice([2, 3, 4, 6, 8]), hole // size) if rng.random() < 0.3 else 1
        step = rng.randint(0, 2)
        for k in range(count):
            filling.append((offset, size, life + step * k))
            offset, hole = offset + size, hole - size
    return filling


def _life(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.15:
        return rng.randint(40, 160)
    return rng.randint(1, 6) if kind < 0.6 else rng.randint(4, 30)


def _problem(rows: list[tuple[int, int, int]]) -> Problem:
    requests = tuple(Request(f"b{k}", lower, upper, UNIT * units) for k, (lower, upper, units) in enumerate(rows))
    changes: dict[int, int] = {}
    for r in requests:
        changes[r.lower] = changes.get(r.lower, 0) + r.size
        changes[r.upper] = changes.get(r.upper, 0) - r.size
    load = peak = 0
    for moment in sorted(changes):
        load += changes[moment]
        peak = max(peak, load)
    return Problem(requests=requests, capacity=peak)
