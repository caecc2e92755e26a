"""``memo doctor``: what works on this machine, and why the rest does not."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from memo_runtime.cli.answering import answer
from memo_runtime.cli.exits import ExitCode


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, to paste or to parse.")
    ] = False,
) -> None:
    """Say what works on this machine: versions, devices, limits, link rates, and a self-test step.

    Exits with 0 where every needed package loads and the self-test holds on every device, else with 1.

    \b
    Examples:
      memo doctor
      memo doctor --json > doctor.json
    """
    from memo_runtime.cli.examination import examination_text, examine

    found = examine()
    answer(json.dumps(asdict(found)) if as_json else examination_text(found))
    raise typer.Exit(ExitCode.OK if found.ok else ExitCode.BUG)
