"""Plain-text tables, and runs of like blocks as one line.

Tables are for terminals and log files alike: no colours, no lines drawn, at most ``WIDTH`` columns.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import groupby
from typing import TypeVar

from memo_runtime.records import BlockPlan
from memo_runtime.reports import BlockReport

WIDTH = 110
_GAP = "  "
_LEAST_NAME = 16

_Item = TypeVar("_Item")
_Block = TypeVar("_Block", bound=BlockPlan | BlockReport)
_NUMBER = re.compile(r"\d+")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: Iterable[int] = (0,)) -> str:
    """``rows`` under ``header``, numbers to the right and ``text_columns`` to the left.

    A column without any content is left out. Where a line would be too wide, the first column loses its
    front: the end of a module's name says more than its beginning.
    """
    shown = [index for index in range(len(header)) if index == 0 or any(row[index] for row in rows)]
    left = set(text_columns)
    widths = [max(len(cells[index]) for cells in (header, *rows)) for index in shown]
    room = WIDTH - sum(widths[1:]) - len(_GAP) * (len(shown) - 1)
    widths[0] = min(widths[0], max(room, _LEAST_NAME))
    lines = []
    for cells in (header, *rows):
        first, *others = (cells[index] for index in shown)
        aligned = [
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, cell, width in zip(shown, (_shortened(first, widths[0]), *others), widths, strict=True)
        ]
        lines.append(_GAP.join(aligned).rstrip())
    return "\n".join(lines)


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else ".." + name[len(name) - width + 2 :]


def amount(value: float, show: Callable[[float], str]) -> str:
    """``show(value)``, or a dash for nothing, so that what happened stands out."""
    return show(value) if value else "-"


def reasons_text(reasons: Sequence[tuple[str, str]]) -> list[str]:
    """Why blocks run as they do, as wrapped lines ``name: reason``; blocks without a reason are left out."""
    lines = [""] if any(reason for _, reason in reasons) else []
    for name, reason in reasons:
        if reason:
            lines += textwrap.wrap(f"{name}: {reason}", WIDTH, subsequent_indent="  ")
    return lines


def notes_text(notes: Sequence[str]) -> list[str]:
    """Notes as wrapped lines under a heading; nothing where there are none."""
    if not notes:
        return []
    lines = ["", "notes"]
    for note in notes:
        lines += textwrap.wrap(note, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return lines


def runs(items: Sequence[_Item], key: Callable[[_Item], Hashable]) -> list[list[_Item]]:
    """Neighbours of the same ``key`` together."""
    return [list(group) for _, group in groupby(items, key)]


def run_rows(
    blocks: Sequence[_Block], key: Callable[[_Block], Hashable], cells: Callable[[_Block], tuple[str, ...]]
) -> tuple[list[tuple[str, ...]], list[tuple[str, str]]]:
    """(table rows, reasons) of named blocks, equal neighbours as one."""
    rows: list[tuple[str, ...]] = []
    reasons: list[tuple[str, str]] = []
    for run in runs(blocks, key):
        name = run_name([block.name for block in run])
        rows.append((name, *cells(run[0])))
        reasons.append((name, run[0].reason))
    return rows, reasons


def run_name(names: Sequence[str]) -> str:
    """One name for a run: ``layers.0`` to ``layers.29`` is ``layers.0-29``.

    Names that do not count up by one in a single number are given as ``first .. last (n)``.
    """
    first, last = names[0], names[-1]
    if len(names) == 1:
        return first
    for match in _NUMBER.finditer(first):
        head, tail, start = first[: match.start()], first[match.end() :], int(match.group())
        if list(names) == [f"{head}{start + step}{tail}" for step in range(len(names))]:
            return f"{head}{start}-{start + len(names) - 1}{tail}"
    return f"{first} .. {last} ({len(names)})"


def tokens_text(lengths: set[int]) -> str:
    """Lengths of the sequences: ``4,096 tokens``, or the range where stacks differ."""
    if not lengths:
        return "no blocks"
    low, high = min(lengths), max(lengths)
    return f"{low:,} tokens" if low == high else f"{low:,} to {high:,} tokens"
