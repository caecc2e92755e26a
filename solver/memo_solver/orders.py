"""Orders in which requests are placed: for first fit, and for the exact search.

Each order is a permutation of the positions in a section; ties fall back to the
position, which the section has made independent of names and row order.
"""

from __future__ import annotations

import random

from memo_solver.bounds import contention
from memo_solver.sections import Section

_Key = tuple[int, ...]


def heuristic_names() -> list[str]:
    """Orders for first fit.

    The classes are of lifetime or size: within one, requests are much alike and follow each other in time, so
    that each finds the place of its predecessor. Where many micro-batches are under way at once and sizes vary,
    this wastes a tenth of what the other orders do.
    """
    return [
        "contention", "life classes", "start", "size classes", "fine life classes", "area",
        "life classes, backward", "size", "duration", "contention-area",
    ]  # fmt: skip


def heuristic_order(section: Section, name: str, peak: list[int]) -> list[int]:
    """One of the orders of `heuristic_names`; `peak` is the section's contention."""
    size, width = section.size, _widths(section)
    keys: list[_Key]
    if name == "contention":
        keys = [(-p, -s) for p, s in zip(peak, size, strict=True)]
    elif name == "contention-area":
        keys = [(-p, -s * w) for p, s, w in zip(peak, size, width, strict=True)]
    elif name == "size":
        keys = [(-s, -w) for s, w in zip(size, width, strict=True)]
    elif name == "area":
        keys = [(-s * w, -s) for s, w in zip(size, width, strict=True)]
    elif name == "duration":
        keys = [(-w, -s) for s, w in zip(size, width, strict=True)]
    elif name == "start":
        keys = [(f, -s) for f, s in zip(section.first, size, strict=True)]
    elif name == "life classes":
        keys = [(-(w.bit_length() // 2), f, -s) for w, f, s in zip(width, section.first, size, strict=True)]
    elif name == "fine life classes":
        keys = [(-w.bit_length(), f, -s) for w, f, s in zip(width, section.first, size, strict=True)]
    elif name == "life classes, backward":
        keys = [(-w.bit_length(), -last, -s) for w, last, s in zip(width, section.last, size, strict=True)]
    elif name == "size classes":
        keys = [(-s.bit_length(), f, -w) for s, f, w in zip(size, section.first, width, strict=True)]
    else:
        raise AssertionError(f"no order is called {name!r}")
    return _sorted(keys)


def exact_orders(section: Section) -> list[list[int]]:
    """Static orders for the canonical search; one alone is brittle, so several take turns."""
    peak = contention(section)
    width = _widths(section)
    area = [s * w for s, w in zip(section.size, width, strict=True)]
    rows = list(zip(peak, width, area, section.size, strict=True))
    return [
        _sorted([(-p, -w, -a) for p, w, a, _ in rows]),
        _sorted([(-p, -a, -w) for p, w, a, _ in rows]),
        _sorted([(-w, -a, -p) for p, w, a, _ in rows]),
        _sorted([(-a, -p, -w) for p, w, a, _ in rows]),
        _sorted([(-s, -w, -p) for p, w, _, s in rows]),
    ]


def shaken(order: list[int], *, noise: float, seed: str) -> list[int]:
    """The order with every request moved by a normal random share `noise` of its length.

    Where an order meets a long dead end, a slightly different one often does not:
    many short tries solve what one long try never does.
    """
    rng = random.Random(seed)
    place = {i: rank + rng.gauss(0.0, noise * len(order)) for rank, i in enumerate(order)}
    return sorted(order, key=lambda i: (place[i], i))


def _widths(section: Section) -> list[int]:
    return [last - first + 1 for first, last in zip(section.first, section.last, strict=True)]


def _sorted(keys: list[_Key]) -> list[int]:
    return sorted(range(len(keys)), key=keys.__getitem__)  # stable: equal keys stay in order of position
