"""A plan as one HTML page that needs nothing else: addresses over time, the load, the lanes of compute and copies."""

from __future__ import annotations

import html
import json
import os
from typing import Any

from memo_runtime.output import write_output
from memo_runtime.records import Plan
from memo_runtime.reporting.lanes import lanes_of
from memo_runtime.reporting.page_template import PAGE
from memo_runtime.reporting.plan_table import plan_table


def write_page(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes the page of ``plan`` to ``path``, as ``output.write_output`` does.

    Raises:
        OutputError: the file cannot be written.
    """
    write_output(path, plan_page(plan).encode())


def plan_page(plan: Plan) -> str:
    """The page as text."""
    # A name may hold anything; "</" would end the script.
    data = json.dumps(_data(plan), separators=(",", ":")).replace("</", "<\\/")
    title = f"memo plan: {plan.seq_len:,} tokens, {plan.profile.device_name or plan.profile.device_type}"
    return (
        PAGE.replace("@TITLE@", html.escape(title))
        .replace("@TABLE@", html.escape(plan_table(plan)))
        .replace("@DATA@", data)
    )


def _data(plan: Plan) -> dict[str, Any]:
    rows = [[row.id, row.lower, row.upper, row.size, row.offset] for row in plan.placement]
    load = _load(plan)
    return {
        "rows": rows,
        "load": load,
        "bound": max((height for _, height in load), default=0),
        "arena": max((row.offset + row.size for row in plan.placement), default=0),
        "bars": [[bar.lane, bar.block, bar.what, bar.start, bar.end] for bar in lanes_of(plan)],
    }


def _load(plan: Plan) -> list[tuple[int, int]]:
    """(event, bytes alive from there on)."""
    changes: dict[int, int] = {}
    for row in plan.placement:
        changes[row.lower] = changes.get(row.lower, 0) + row.size
        changes[row.upper] = changes.get(row.upper, 0) - row.size
    found, height = [], 0
    for tick in sorted(changes):
        height += changes[tick]
        found.append((tick, height))
    return found
