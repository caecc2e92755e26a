"""``memo show``: a saved plan or profile as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def show(file: Annotated[Path, typer.Argument(help="A profile or plan, as JSON.", metavar="FILE")]) -> None:
    """Print a plan or profile file as a table.

    \b
    Examples:
      memo show plan.json
      memo show profile.json
    """
    from memo_runtime.persist import load
    from memo_runtime.records import Plan
    from memo_runtime.reporting.plan_table import plan_table
    from memo_runtime.reporting.profile_table import profile_table

    value = load(file)
    typer.echo(plan_table(value) if isinstance(value, Plan) else profile_table(value))
