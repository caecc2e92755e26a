"""The rows of a run as a table: one line per contender, grouped by length. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby

from benchmarks.harness import forecast
from benchmarks.harness.geometry import SHARES
from benchmarks.harness.rows import Row, RowError, of_contenders
from memo_runtime.reporting.text_table import table

_MEMORY = ("peak_allocated", "peak_reserved", "host_rss", "pinned_bytes", "budget")
_UNITS = (("GiB", 2**30), ("MiB", 2**20))
#: Speed is given against this one.
BASE = "checkpoint"
_HEADER = (
    "contender", "step s", "p20", "p80", "n", "speed", "MFU", "HFU",
    "peak", "reserved", "RSS", "pinned", "budget", "gradients",
)  # fmt: skip

_LONGEST_HEADER = ("contender", "longest", "too long", "peak", "reserved", "RSS", "pinned", "budget")


def _number(value: float | None, shown: str) -> str:
    return "" if value is None else format(value, shown)


def first_line(text: str) -> str:
    """The line of an error that is complete alone."""
    return text.splitlines()[0] if text else ""


def _memory(value: int | None, unit: int) -> str:
    return "" if value is None else f"{value / unit:.2f}"


def _cells(row: Row, base: Row | None, unit: int) -> tuple[str, ...]:
    memory = tuple(_memory(row[name], unit) for name in _MEMORY)
    gradients = _number(row["gradient_difference"], ".1e")
    if row["status"] != "ok":
        return (row["contender"], row["status"], *[""] * 6, *memory, gradients)
    speed = base["step_seconds"] / row["step_seconds"] if base and base["status"] == "ok" else None
    times = tuple(_number(row[name], ".4g") for name in ("step_seconds", "p20", "p80"))
    shares = tuple(_number(row[name], ".1%") for name in ("mfu", "hfu"))
    return (row["contender"], *times, str(row["n"]), _number(speed, ".2f"), *shares, *memory, gradients)


def _copies(row: Row) -> Iterator[str]:
    """What a traced step's copies took."""
    trace = (row["details"] or {}).get("trace")
    if trace and trace["exposed_share"] is not None:
        yield (
            f"{row['contender']} at {row['seq_len']:,}: {trace['copy_seconds']:.3f} s of copies, "
            f"{trace['exposed_share']:.1%} not hidden ({trace['file']})"
        )


def _unit(rows: Sequence[Row]) -> tuple[str, int]:
    """GiB, or MiB where no peak reaches one."""
    largest = max((row["peak_allocated"] or 0 for row in rows), default=0)
    return _UNITS[0] if largest >= _UNITS[0][1] else _UNITS[1]


def _conditions(row: Row) -> str:
    """What all rows of a run have in common."""
    blocks = "all" if row["blocks"] is None else row["blocks"]
    config, where = row["config"], row["gpu"] or row["cpu"]
    kinds = f"{config['dtype']}, {config['attention']} attention, torch {row['versions']['torch']}"
    if config.get("allocator"):
        kinds += f", allocator {config['allocator']}"
    if config.get("lora"):
        kinds += f", LoRA of rank {config['lora']}"
    share = f" ({SHARES[row['geometry']]})" if row["geometry"] in SHARES else ""
    return f"run {row['run']}: {row['geometry']}{share}, {blocks} blocks, scope {row['scope']}, {kinds}, {where}"


def _reference(rows: Sequence[Row]) -> str:
    """Whose gradients those of ``rows`` were compared with."""
    compared = [row for row in rows if row["gradient_difference"] is not None]
    names = [(row["details"] or {}).get("gradient_reference", "unwrapped") for row in compared]
    return " or ".join(dict.fromkeys(names)) or "unwrapped"


def too_long(row: Row) -> str:
    """What a column of lengths that did not fit says of ``row``: its length, or that it is no matter of memory."""
    return f"{row['seq_len']:,}" if row["status"] == "oom" else {"error": "failed"}.get(row["status"], row["status"])


def longest_table(rows: Sequence[Row]) -> str:
    """The longest length of each contender of a rehearsed run, and what the next one tried was short of.

    Raises:
        RowError: real steps among them.
    """
    if not all(row.get("rehearsed") for row in rows):
        raise RowError(f"run '{rows[0]['run']}' has rehearsed rows and real ones, which are not put into one table")
    unit, size = _unit(rows)
    lines, told = [], []
    for name in dict.fromkeys(row["contender"] for row in rows):
        mine = [row for row in rows if row["contender"] == name]
        there = [row for row in mine if row["status"] == "ok"]
        best = max(there, key=lambda row: int(row["seq_len"]), default=None)
        reached = int(best["seq_len"]) if best is not None else 0
        above = [row for row in mine if row["status"] != "ok" and int(row["seq_len"]) > reached]
        short = min(above, key=lambda row: int(row["seq_len"]), default=None)
        memory = [_memory(best[one] if best is not None else None, size) for one in _MEMORY]
        beyond = "" if short is None else too_long(short)
        lines.append((name, f"{reached:,}" if best is not None else "none", beyond, *memory))
        if short is not None:
            told.append(f"{name} at {short['seq_len']:,}: {short['status']}, {first_line(short['error'])}")
    head = f"longest length by rehearsal (attention replaced), the shortest that did not fit; {unit}"
    return "\n".join([_conditions(rows[0]), head, "", table(_LONGEST_HEADER, lines), *([""] if told else []), *told])


def run_table(
    rows: Sequence[Row], *, contenders: Collection[str] | None = None, lengths: Collection[int] | None = None
) -> str:
    """A table for each length, and why contenders stopped.

    Speed is times as fast as ``checkpoint``, shown or not.

    Args:
        contenders, lengths: what is shown; None: all.
    """
    whole = of_contenders(rows)
    bases = {int(row["seq_len"]): row for row in whole if row["contender"] == BASE}
    rows = [
        row
        for row in whole
        if (contenders is None or row["contender"] in contenders) and (lengths is None or row["seq_len"] in lengths)
    ]
    if not rows:
        return "no rows"
    if any(row.get("rehearsed") for row in rows):
        return longest_table(rows)
    first, (unit, size) = rows[0], _unit(whole)
    lines = [
        _conditions(first),
        f"seconds of a step; times as fast as {BASE}; {unit}; relative L2 distance of gradients from "
        f"{_reference(rows)}'s",
    ]
    ordered = sorted(rows, key=lambda row: int(row["seq_len"]))
    for tokens, group in groupby(ordered, key=lambda row: int(row["seq_len"])):
        members = list(group)
        lines += ["", f"{tokens:,} tokens", table(_HEADER, [_cells(row, bases.get(tokens), size) for row in members])]
    over = [row for row in ordered if row["gpu"] and row["budget"] and (row["peak_allocated"] or 0) > row["budget"]]
    lines += [""] if over else []
    lines += [f"{row['contender']} at {row['seq_len']:,}: its peak is above its budget" for row in over]
    lines += [text for row in ordered for text in _copies(row)]
    lines += [
        f"{row['contender']} at {row['seq_len']:,}: forecast against measured, {apart}"
        for row in ordered
        if row["gpu"] and (apart := forecast.text(row))
    ]
    stopped = [row for row in ordered if row["status"] != "ok"]
    lines += [""] if stopped else []
    lines += [
        f"{row['contender']} at {row['seq_len']:,}: {row['status']}, {first_line(row['error'])}" for row in stopped
    ]
    return "\n".join(lines)
