"""Orders in which requests are placed: for first fit, and for the exact search.

Each order is a permutation of the positions in a section; ties fall back to the
position, which the section has made independent of names and row order.
"""

from __future__ import annotations

from memo_solver.bounds import contention
from memo_solver.sections import Section


def heuristic_orders(section: Section) -> dict[str, list[int]]:
    """Orders for first fit, the best on training traces first."""
    peak = contention(section)
    size = section.size
    width = _widths(section)
    keys: dict[str, list[tuple[int, ...]]] = {
        "contention": [(-p, -s) for p, s in zip(peak, size, strict=True)],
        "contention-area": [(-p, -s * w) for p, s, w in zip(peak, size, width, strict=True)],
        "size": [(-s, -w) for s, w in zip(size, width, strict=True)],
        "area": [(-s * w, -s) for s, w in zip(size, width, strict=True)],
        "duration": [(-w, -s) for s, w in zip(size, width, strict=True)],
        "start": [(f, -s) for f, s in zip(section.first, size, strict=True)],
    }
    return {name: _sorted(key) for name, key in keys.items()}


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


def _widths(section: Section) -> list[int]:
    return [last - first + 1 for first, last in zip(section.first, section.last, strict=True)]


def _sorted(keys: list[tuple[int, ...]]) -> list[int]:
    return sorted(range(len(keys)), key=lambda i: (keys[i], i))
