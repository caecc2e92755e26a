"""Instances by seed, for tests, benchmarks and `memo bench`: sizes in arbitrary units.

`planted_packing`  a perfect packing cut at random: the optimum is the capacity.
`random_requests`  no structure.
`loose_packing`    a planted packing thinned out: full at one time only.
Training traces and layered steps are in `memo_solver.training`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from memo_solver.records import Problem, Request


@dataclass(frozen=True, slots=True)
class _Box:
    left: int
    right: int
    bottom: int
    top: int

    @property
    def area(self) -> int:
        return (self.right - self.left) * (self.top - self.bottom)


def planted_packing(
    num_requests: int, *, seed: int, width: int = 1000, height: int = 4096, shuffle: bool = True
) -> Problem:
    """Cut a width x height box into at least `num_requests` pieces by random cuts.

    A cut is a guillotine cut (one line across a piece) or a pinwheel (five
    pieces round a hole, which no guillotine cut can make). Capacity = height =
    load at every time.
    """
    rng = random.Random(f"planted {num_requests} {seed} {width} {height}")
    boxes = [_Box(0, width, 0, height)]
    while len(boxes) < num_requests:
        # Larger pieces are cut sooner, so that sizes stay within a few powers of two.
        at = max(rng.sample(range(len(boxes)), min(3, len(boxes))), key=lambda k: boxes[k].area)
        pieces = _cut(boxes[at], rng, num_requests - len(boxes))
        boxes[at : at + 1] = pieces
    if shuffle:
        rng.shuffle(boxes)
    requests = tuple(
        Request(f"r{k}", box.left, box.right, box.top - box.bottom) for k, box in enumerate(boxes)
    )
    return Problem(requests=requests, capacity=height)


def _cut(box: _Box, rng: random.Random, num_missing: int) -> list[_Box]:
    wide, tall = box.right - box.left, box.top - box.bottom
    if num_missing >= 4 and wide >= 3 and tall >= 3 and rng.random() < 0.3:
        x1, x2 = sorted(rng.sample(range(box.left + 1, box.right), 2))
        y1, y2 = sorted(rng.sample(range(box.bottom + 1, box.top), 2))
        if rng.random() < 0.5:
            return [
                _Box(box.left, x2, box.bottom, y1), _Box(x2, box.right, box.bottom, y2),
                _Box(x1, box.right, y2, box.top), _Box(box.left, x1, y1, box.top),
                _Box(x1, x2, y1, y2),
            ]  # fmt: skip
        return [
            _Box(x1, box.right, box.bottom, y1), _Box(x2, box.right, y1, box.top),
            _Box(box.left, x2, y2, box.top), _Box(box.left, x1, box.bottom, y2),
            _Box(x1, x2, y1, y2),
        ]  # fmt: skip
    if wide < 2 and tall < 2:
        return [box]
    across = tall >= 2 and (wide < 2 or rng.random() < 0.5)
    if across:
        y = rng.randrange(box.bottom + 1, box.top)
        return [_Box(box.left, box.right, box.bottom, y), _Box(box.left, box.right, y, box.top)]
    x = rng.randrange(box.left + 1, box.right)
    return [_Box(box.left, x, box.bottom, box.top), _Box(x, box.right, box.bottom, box.top)]


def random_requests(
    num_requests: int, *, seed: int, horizon: int = 100, max_size: int = 50, max_alignment: int = 1
) -> Problem:
    """Requests with uniform lifetimes and sizes; alignments are powers of two."""
    rng = random.Random(f"random {num_requests} {seed} {horizon} {max_size} {max_alignment}")
    requests = []
    for k in range(num_requests):
        lower = rng.randrange(horizon)
        upper = lower + 1 + min(int(rng.expovariate(6 / horizon)), horizon)
        alignment = 1 << rng.randrange(max_alignment.bit_length()) if max_alignment > 1 else 1
        requests.append(Request(f"r{k}", lower, upper, rng.randint(1, max_size), alignment))
    return Problem(requests=tuple(requests))


def loose_packing(
    num_requests: int, *, seed: int, slack: float = 0.3, width: int = 1000, height: int = 4096
) -> Problem:
    """A planted packing thinned out: capacity equals the peak load at one time only.

    Like a compiler's instance: `slack` is the share of the requests that do not
    cross the chosen time and are removed or shrunk.
    """
    base = planted_packing(int(num_requests * (1 + slack / 2)), seed=seed, width=width, height=height)
    rng = random.Random(f"loose {num_requests} {seed} {slack}")
    time = rng.randrange(width)
    kept = []
    for r in base.requests:
        crosses = r.lower <= time < r.upper
        if crosses or rng.random() > slack:
            kept.append(r)
        elif rng.random() < 0.5 and r.size > 1:
            kept.append(Request(r.id, r.lower, r.upper, rng.randint(1, r.size)))
    return Problem(requests=tuple(kept), capacity=height)
