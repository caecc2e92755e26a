"""``memo show``: a saved plan or profile as a table, and a plan as a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memo_runtime.cli.answering import answer


def show(
    file: Annotated[Path, typer.Argument(help="A profile or plan, as JSON.", metavar="FILE")],
    *,
    html: Annotated[
        Path | None, typer.Option(help="Also write one HTML page: addresses over time, compute and copies.")
    ] = None,
) -> None:
    """Print a plan or profile file as a table.

    \b
    Examples:
      memo show plan.json
      memo show plan.json --html plan.html
      memo show profile.json
    """
    from memo_runtime.errors import ArgumentError
    from memo_runtime.persist import load
    from memo_runtime.records import Plan
    from memo_runtime.reporting.plan_page import write_page
    from memo_runtime.reporting.plan_table import plan_table
    from memo_runtime.reporting.profile_table import profile_table

    value = load(file)
    if html is not None:
        if not isinstance(value, Plan):
            raise ArgumentError(f"--html draws plans, and {file} holds a profile: plan from it first (memo.plan)")
        if not html.name:
            raise ArgumentError("--html is empty: name the file of the page, such as --html plan.html")
        if html.exists() and html.samefile(file):
            raise ArgumentError(f"--html {html}: the page would take the place of the plan: name another file")
        write_page(value, html)
    answer(plan_table(value) if isinstance(value, Plan) else profile_table(value))
