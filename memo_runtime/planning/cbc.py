"""CBC, the solver that comes with PuLP, asked by its files: MPS in, a list of values out.

    ROWS       rows C0000000, C0000001, ..., and OBJ, which is to be as little as possible
    COLUMNS    columns X0000000, X0000001, ..., each with its factors in all rows
    RHS        what rows are compared to
    BOUNDS     of columns that have any

Of several best answers CBC gives the one that it comes to first, which the order of columns and rows decides. Columns
are in the order of their names, as in files that PuLP writes.
"""

from __future__ import annotations

import logging
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from memo_runtime.planning.linear import LinearProgram
from memo_runtime.planning.modelling import load_pulp

_LOG = logging.getLogger("memo_runtime")

_OPTIMAL = "Optimal"
_NO_SOLUTION = ("Infeasible", "Unbounded")
#: What the line of a variable starts with that is outside its bounds by more than CBC's tolerance.
_STRAYED = "**"


def solve(program: LinearProgram) -> list[float] | None:
    """The value of each variable, in the order in which they were made; None: no solution, or none was found."""
    order = sorted(range(len(program.variables)), key=lambda number: program.variables[number][0])
    try:
        return _values(_ask("".join(_mps(program, order))), order)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        _LOG.warning("the linear program was not solved, a simpler plan is used: %s", error)
        return None


def _values(answer: str, order: Sequence[int]) -> list[float] | None:
    """What ``answer`` says; variables that it does not name are 0.

    Raises:
        ValueError: it is no answer.
    """
    status, *lines = answer.splitlines() or [""]
    if status.startswith(_NO_SOLUTION):
        return None
    if not status.startswith(_OPTIMAL):
        raise ValueError(f"CBC answered {status!r}")
    values = [0.0] * len(order)
    for line in lines:
        try:
            _, name, value, *_ = line.removeprefix(_STRAYED).split()
            values[order[int(name.removeprefix("X"))]] = float(value)
        except (ValueError, IndexError):
            raise ValueError(f"CBC answered {line!r}") from None
    return values


def executable() -> str:
    """Where CBC is: in PuLP, or where PuLP finds it."""
    pulp = load_pulp()
    with warnings.catch_warnings():
        # PuLP 3 announces that version 4 will get CBC from elsewhere, under another name.
        warnings.simplefilter("ignore", DeprecationWarning)
        solver = pulp.PULP_CBC_CMD(msg=False) if hasattr(pulp, "PULP_CBC_CMD") else pulp.COIN_CMD(msg=False)
    return str(solver.path)


def _ask(question: str) -> str:
    """CBC's answer, silently and on one thread.

    Raises:
        OSError: it cannot be run, or wrote no answer. subprocess.SubprocessError: it failed.
    """
    with tempfile.TemporaryDirectory(prefix="memo_runtime") as folder:
        asked, answered = Path(folder, "program.mps"), Path(folder, "answer")
        asked.write_text(question, encoding="ascii")
        subprocess.run(
            [executable(), asked, "-threads", "1", "-timeMode", "elapsed", "-solve", "-solution", answered],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        return answered.read_text(encoding="ascii")


def _mps(program: LinearProgram, order: Sequence[int]) -> Iterator[str]:
    rows = [f"C{number:07d}" for number in range(len(program.rows))]
    columns: list[list[str]] = [[] for _ in order]
    names = [""] * len(order)
    for at, number in enumerate(order):
        names[number] = f"X{at:07d}"
    for row, (expression, _) in zip(rows, program.rows, strict=True):
        for number, factor in expression.terms.items():
            columns[number].append(f"    {names[number]}  {row}  {factor: .12e}\n")
    for number, factor in program.objective.terms.items():
        columns[number].append(f"    {names[number]}  OBJ       {factor: .12e}\n")
    yield "*SENSE:Minimize\nNAME          MODEL\nROWS\n N  OBJ\n"
    yield from (f" {sense}  {row}\n" for row, (_, sense) in zip(rows, program.rows, strict=True))
    yield "COLUMNS\n"
    for number in order:
        yield from columns[number]
    yield "RHS\n"
    for row, (expression, _) in zip(rows, program.rows, strict=True):
        # No -0.
        yield f"    RHS       {row}  {0.0 - expression.constant: .12e}\n"
    yield "BOUNDS\n"
    for number in order:
        most = program.variables[number][1]
        if most is not None:
            yield f" {'UP' if most else 'FX'} BND       {names[number]}  {most: .12e}\n"
    yield "ENDATA\n"
