"""The longest length that a contender reaches, searched by rehearsals. Needs no torch.

Twice as long each time until memory is short, in one process; then between the two, each bracket in a process of its
own. Where two peaks lie on a line that meets what the device has, the search goes on around that point; a runtime that
fills its budget at any length has no such line, and its bracket is halved.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.rows import Row

#: The search ends where what fits and what does not are this close together, relative.
PRECISION = 0.02
#: A bracket wider than this is narrowed by the line of peaks first.
_WIDE = 1.25
#: How far on either side of that line's point is tried.
_AROUND = 0.008


def next_lengths(rows: Sequence[Row], first: int, last: int) -> tuple[int, ...]:
    """Lengths to rehearse next, shortest first; none where the search is over.

    Args:
        rows: of one contender, in any order. first, last: the search begins at the one and never goes beyond the other.
    """
    if any(row["status"] not in ("ok", "oom") for row in rows):
        return ()
    there = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: int(row["seq_len"]))
    short = [int(row["seq_len"]) for row in rows if row["status"] == "oom"]
    if not there:
        # Of a search that began at a longer one: what lies below the shortest that did not fit.
        return tuple(tokens for tokens in _doubling(first, last) if tokens < min(short, default=last + 1))
    low = int(there[-1]["seq_len"])
    high = min((tokens for tokens in short if tokens > low), default=None)
    if high is None:
        return _doubling(2 * low, last) if low < last else ()
    unit = _unit(first)
    if high - low <= max(unit, PRECISION * low):
        return ()
    met = _meets(there) if high > _WIDE * low else None
    wanted = [met * (1 - _AROUND), met * (1 + _AROUND)] if met is not None else [(low + high) / 2]
    inside = {tokens for one in wanted if low < (tokens := round(one / unit) * unit) < high}
    return tuple(sorted(inside)) or ((low + high) // 2,)


def _doubling(start: int, last: int) -> tuple[int, ...]:
    lengths = []
    while start < last:
        lengths.append(start)
        start *= 2
    return (*lengths, last)


def _unit(first: int) -> int:
    """Lengths are multiples of this."""
    return 1024 if first >= 16_384 else max(1, first // 16)


def _meets(rows: Sequence[Row]) -> float | None:
    """Where the line through the last two peaks meets what may be allocated; None: it does not rise, or not known."""
    if len(rows) < 2:
        return None
    before, latest = rows[-2:]
    memory = (latest["details"] or {}).get("memory")
    rise = (latest["peak_allocated"] or 0) - (before["peak_allocated"] or 0)
    if memory is None or rise <= 0:
        return None
    more = (memory - latest["peak_allocated"]) / rise
    return float(latest["seq_len"] + more * (latest["seq_len"] - before["seq_len"]))
