"""``memo solve``: offsets for the requests of a file, with a bound on the answer.

The answer goes to stdout, the placement to ``-o`` (replaced in one step) or into ``--json``, progress to stderr.
Nothing of the solver is imported before the verb runs.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memo_runtime.cli.answering import answer
from memo_runtime.cli.exits import ExitCode

if TYPE_CHECKING:
    from memo_solver.records import Solution


def solve(
    file: Annotated[
        Path,
        typer.Argument(help="CSV (id,lower,upper,size[,alignment][,offset]) or JSON.", metavar="FILE.csv"),
    ],
    *,
    capacity: Annotated[
        str | None, typer.Option(help="Ask whether it fits: a size such as 1048576 or 70GiB.")
    ] = None,
    time_limit: Annotated[str, typer.Option(help="Hard limit, such as 30s, 500ms or 2m.")] = "30s",
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same placement.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Searches side by side; all cores if not given, which is also the most.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where the placement goes (.csv or .json).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Give every request of a file an address, as low as possible.

    Without --capacity the peak is minimised. Ctrl-C and the time limit return the best placement so far.
    Exits with 0 where a placement is found, 3 where it is proved that none fits, 4 where none was found in
    the time.

    \b
    Examples:
      memo solve trace.csv -o placed.csv
      memo solve trace.csv --capacity 70GiB --time-limit 60s --json
    """
    from memo_runtime.cli.solve_output import ProgressLine, summary_json, summary_text
    from memo_solver.engine import solve as run
    from memo_solver.errors import MemoSolverError
    from memo_solver.native import native_status
    from memo_solver.params import SolveParams
    from memo_solver.reading import read_file
    from memo_solver.writing import check_offsets, check_writable, write_placement

    try:
        if output is not None:
            check_writable(output)
        params = SolveParams(time_limit_seconds=_seconds(time_limit), seed=seed, num_threads=threads)
        loaded = read_file(file, capacity=_bytes(capacity))
        status = native_status()
        if not status.available:
            typer.echo(f"memo: compiled search not in use ({status.reason}); this is slower", err=True)
        with ProgressLine() as line:
            solution = run(loaded.problem, params, progress=line, hint=loaded.placement)
        if as_json and solution.placement is not None:
            check_offsets(solution.placement.problem, solution.placement.offsets)
        if output is not None and solution.placement is not None:
            with _uninterrupted():
                write_placement(solution.placement, output)
    except MemoSolverError as error:
        typer.echo(f"memo: {error}", err=True)
        raise typer.Exit(ExitCode.USAGE) from error
    except KeyboardInterrupt:
        typer.echo("memo: interrupted before there was an answer", err=True)
        raise
    answer(json.dumps(summary_json(solution)) if as_json else summary_text(solution, written_to=output))
    raise typer.Exit(_exit_code(solution))


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Another Ctrl-C waits until the placement is on the disk: it takes a moment, and the answer would be lost."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _exit_code(solution: Solution) -> ExitCode:
    from memo_solver.records import Status

    codes: dict[Any, ExitCode] = {
        Status.OPTIMAL: ExitCode.OK,
        Status.FEASIBLE: ExitCode.OK,
        Status.INFEASIBLE: ExitCode.INFEASIBLE,
        Status.UNKNOWN: ExitCode.NOT_FOUND,
    }
    return codes[solution.status]


def _bytes(text: str | None) -> int | None:
    from memo_runtime.units import parse_bytes

    if text is None:
        return None
    try:
        if text.strip().replace(".", "", 1).isdecimal() and "." in text:
            raise ValueError(f"{text} is no whole number of bytes: give 1048576 or 1.5GiB")
        # Plain integers are taken digit by digit: a float would round beyond 2^53.
        return int(text) if text.strip().isdecimal() else parse_bytes(text)
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(str(error), param_hint="--capacity") from error


def _seconds(text: str) -> float:
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
    value = text.strip().lower()
    for unit, factor in units.items():
        number = value.removesuffix(unit)
        if number != value and number.replace(".", "", 1).isdecimal():
            return _positive(float(number) * factor)
    if value.replace(".", "", 1).isdecimal():
        return _positive(float(value))
    raise typer.BadParameter(f"{text!r} is not a time: write 30s, 500ms, 2m or 1h", param_hint="--time-limit")


def _positive(seconds: float) -> float:
    if seconds <= 0:
        raise typer.BadParameter("must be above 0", param_hint="--time-limit")
    return seconds
