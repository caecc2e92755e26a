"""``memo bench table``: the side-by-side tables of files of rows, and of the documents that show them. Needs no torch.

A document keeps the command that made a table beside it:

    <!-- memo bench table benchmarks/results/FILE.jsonl --run NAME -->
    the table
    <!-- end of the table -->

``--refresh DOCUMENT`` makes all tables of a document again, and a test of the project says when one is stale.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.harness.rows import RUN_FIELDS, Row, RowError, differing, of_contenders, read_rows
from benchmarks.harness.side_by_side import Comparison, markdown
from benchmarks.harness.table import run_table
from memo_runtime.errors import OutputError
from memo_runtime.output import print_all, write_output
from memo_runtime.units import parse_tokens

DONE, USAGE = 0, 2
#: A line of a document that begins a table, or ends one.
_BEGINNING = "<!-- memo bench table"
_START = re.compile(rf"{_BEGINNING} (?P<command>.*?) -->")
_STOP = "<!-- end of the table -->"
#: Options that a command in a document has, and --refresh none of.
_CHOICES = ("run", "gpu", "contenders", "lengths", "full")


class _Quiet(argparse.ArgumentParser):
    """Of commands in documents: what is wrong with one is said with its place."""

    def error(self, message: str) -> NoReturn:
        """Not the end of the program.

        Raises:
            RowError: always.
        """
        raise RowError(message)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """As ``error``."""
        self.error(message or "this command makes no table")


def _parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = kind(
        prog="memo bench table",
        description="Contenders side by side, one Markdown table for each run in FILEs. Rows of different runs, and so "
        "of different machines, are never in one table.",
        epilog="docs/benchmarks.md says what is measured. Exit codes: 0 done, 2 usage.",
    )
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE", help="rows, as memo bench run writes them")
    add("--run", action="append", metavar="NAME", help="this run only; may be given again")
    add("--gpu", help="runs on this GPU only, such as 'NVIDIA H100 80GB HBM3'")
    add("--contenders", help="these only, such as checkpoint,memo-auto")
    add("--lengths", help="these only, such as 16K,32K")
    add("--confirmed", metavar="NAME", help="real steps at the longest lengths of a rehearsed run, beside these")
    add("--full", action="store_true", help="every column and reason, as text, as memo bench run prints it")
    add("--refresh", type=Path, action="append", metavar="DOCUMENT", help="make the tables of a document again")
    return parser


def find_comparisons(files: Sequence[Path]) -> list[Comparison]:
    """The runs of ``files``, in their order.

    Raises:
        RowError: a file is missing or holds other rows, or a run whose rows are not comparable.
    """
    found = []
    for path in files:
        if not path.is_file():
            raise RowError(f"{path}: there is no such file of rows")
        whole, size = read_rows(path)
        if size < path.stat().st_size:
            print(f"{path}: its last row was cut off while it was written, and is left out", file=sys.stderr)
        for name in dict.fromkeys(row["run"] for row in whole):
            mine = [row for row in whole if row["run"] == name]
            _check(path, mine)  # the reference of their gradients too
            if rows := tuple(of_contenders(mine)):
                found.append(Comparison(path.as_posix(), rows))
    if not found:
        raise RowError(f"no rows in {', '.join(str(path) for path in files)}")
    return found


def _check(path: Path, rows: Sequence[Row]) -> None:
    """That the rows of one run are comparable, and each there once."""
    first, seen = rows[0], set()
    for row in rows:
        for name in (*RUN_FIELDS, "rehearsed"):
            if (row.get(name) or None) != (first.get(name) or None):
                one, other = differing(first.get(name), row.get(name))
                raise RowError(
                    f"{path}: run '{row['run']}' has rows with {name} = {one!r} and {other!r}, which are not comparable"
                )
        key = (row["contender"], row["seq_len"])
        if key in seen:
            raise RowError(f"{path}: run '{row['run']}' has two rows of {key[0]} at {key[1]}")
        seen.add(key)


def _chosen(found: Sequence[Comparison], given: argparse.Namespace) -> list[Comparison]:
    """What of ``found`` was asked for.

    Raises:
        RowError: a run, GPU, contender or length that is not there; names those that are.
    """
    for name in given.run or ():
        _known("run", name, [one.first["run"] for one in found])
    chosen = [one for one in found if not given.run or one.first["run"] in given.run]
    if given.gpu is not None:
        _known("GPU", given.gpu, [one.first["gpu"] for one in chosen])
        chosen = [one for one in chosen if one.first["gpu"] == given.gpu]
    kept: dict[str, frozenset[Any]] = {}
    if given.contenders is not None:
        kept["contender"] = frozenset(_parts("--contenders", given.contenders))
    if given.lengths is not None:
        rehearsed = next((one.first["run"] for one in chosen if one.rehearsed), None)
        if rehearsed is not None:
            raise RowError(
                f"--lengths: run '{rehearsed}' is of rehearsals, whose table has the longest length of each and no "
                "others: leave it out, or choose real steps with --run"
            )
        try:
            kept["length"] = frozenset(parse_tokens(part) for part in _parts("--lengths", given.lengths))
        except ValueError as error:
            raise RowError(f"--lengths: {error}") from None
    for what, wanted in kept.items():
        field = {"length": "seq_len"}.get(what, what)
        for value in sorted(wanted):
            _known(what, value, sorted({row[field] for one in chosen for row in one.rows}))
    return [replace(one, shown=kept.get("contender"), shown_lengths=kept.get("length")) for one in chosen]


def _parts(option: str, text: str) -> list[str]:
    """What commas separate in ``text``; one at its end is no part.

    Raises:
        RowError: there is nothing in it.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise RowError(f"{option} {text!r} names nothing: name some, separated by commas, or leave it out")
    return parts


def _known(what: str, value: object, there: Sequence[object]) -> None:
    if value not in there:
        listed = ", ".join("none, on a CPU" if one is None else str(one) for one in dict.fromkeys(there))
        raise RowError(f"there are no rows of {what} {value!r}; there are: {listed}")


def _confirming(found: Sequence[Comparison], name: str, rehearsed: Comparison) -> Comparison:
    """The run ``name`` of real steps, made as ``rehearsed`` was.

    Raises:
        RowError: it is not there, or one of the two is not what it should be, or was made otherwise.
    """
    _known("run", name, [one.first["run"] for one in found])
    (real,) = (one for one in found if one.first["run"] == name)
    if not rehearsed.rehearsed or real.rehearsed:
        wrong = rehearsed.first["run"] if not rehearsed.rehearsed else name
        raise RowError(f"--confirmed {name}: real steps beside rehearsals; '{wrong}' is the other kind")
    ours, theirs = ({field: row.get(field) or None for field in RUN_FIELDS if field != "config"} | row["config"]
                    for row in (rehearsed.first, real.first))  # fmt: skip
    for field in sorted({*ours, *theirs} - {"run", "steps", "rehearse"}):
        if ours.get(field) != theirs.get(field):
            raise RowError(
                f"--confirmed {name}: {field} is {theirs.get(field)!r} there and {ours.get(field)!r} in "
                f"'{rehearsed.first['run']}'"
            )
    return real


def tables(arguments: Sequence[str], *, root: Path = Path(), document: Path | None = None) -> str:
    """What ``memo bench table`` prints for ``arguments``.

    Args:
        root: files are there. document: the file that shows it, from which it links to rows; None: as files are named.

    Raises:
        RowError: as in ``find_comparisons``, or something was asked for that is not there.
    """
    given = _parser(_Quiet).parse_args(arguments)
    if given.refresh or not given.files:
        raise RowError("a table is made of FILEs of rows: name one")
    found = find_comparisons([root / path for path in given.files])
    if document is not None:
        found = [replace(one, source=os.path.relpath(one.source, document.parent)) for one in found]
    chosen = _chosen(found, given)
    if given.confirmed is not None:
        if given.full:
            raise RowError("--full has no place for --confirmed: leave one of them out")
        chosen = [replace(one, confirmed=_confirming(found, given.confirmed, one)) for one in chosen]
    if not given.full:
        return "\n\n".join(markdown(one) for one in chosen) + "\n"
    shown = [run_table(one.rows, contenders=one.shown, lengths=one.shown_lengths) for one in chosen]
    return "\n\n".join(shown) + "\n"


def refreshed(document: Path, root: Path) -> str:
    """``document`` with its tables made again by the commands that stand at them, which name files from ``root``.

    Lines end as they did.

    Raises:
        RowError: as in ``tables``, with the line of the command; or it has no such table, one without its end, or is no
            text. Nothing is left out of it.
    """
    try:
        with document.open(encoding="utf-8", newline="") as file:
            lines = file.read().split("\n")
    except UnicodeDecodeError as error:
        raise RowError(f"{document} is not UTF-8 (byte {error.start}): no document of ours") from error
    except OSError as error:
        raise RowError(f"cannot read {document}: {error.strerror or error}") from error
    made: list[str] = []
    began: tuple[int, str] | None = None
    tables_made = 0
    for number, line in enumerate(lines, start=1):
        start = _START.fullmatch(line.strip())
        if start is None and line.strip().startswith(_BEGINNING):
            raise RowError(f"{document}:{number}: a command is one line of its own, from {_BEGINNING!r} to '-->'")
        if start is not None and began is not None:
            break
        if line.strip() == _STOP and began is not None:
            ending = "\r" if line.endswith("\r") else ""
            made += [one + ending for one in _again(document, root, *began)]
            began, tables_made = None, tables_made + 1
        if began is None:
            made.append(line)
        if start is not None:
            began = number, start["command"]
    if began is not None:
        raise RowError(
            f"{document}:{began[0]}: no line below this table is {_STOP!r} before the next one, or the end of the "
            "document: nothing was changed, put it there"
        )
    if not tables_made:
        raise RowError(f"{document}: no table of it has its command beside it")
    return "\n".join(made)


def _again(document: Path, root: Path, number: int, command: str) -> list[str]:
    """The lines that the command at line ``number`` prints.

    Raises:
        RowError: it cannot be read, or as in ``tables``; says where it stands.
    """
    try:
        return tables(shlex.split(command), root=root, document=document).removesuffix("\n").split("\n")
    except (RowError, ValueError) as error:
        raise RowError(f"{document}:{number}: {error}") from error


def _refresh(document: Path) -> None:
    if not document.is_file():
        raise RowError(f"--refresh {document}: there is no such document")
    after = refreshed(document.resolve(), _root(document)).encode("utf-8")
    changed = after != document.read_bytes()
    if changed:
        write_output(document, after)
    print(f"{document}: {'made again' if changed else 'as it was'}", file=sys.stderr)


def _root(document: Path) -> Path:
    """The checkout around ``document``: commands name files from there."""
    for folder in document.resolve().parents:
        if (folder / "benchmarks" / "results").is_dir():
            return folder
    raise RowError(f"--refresh {document}: it is in no checkout, where benchmarks/results would be")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or make those of documents again; an exit code."""
    parser = _parser()
    asked = list(sys.argv[1:] if arguments is None else arguments)
    given = parser.parse_args(asked)
    if bool(given.files) == bool(given.refresh):
        parser.error("give FILEs of rows, or --refresh DOCUMENT")
    beside = [name for name in _CHOICES if getattr(given, name)]
    if given.refresh and beside:
        parser.error(f"--refresh: a document's tables are made by their own commands, so --{beside[0]} goes into those")
    try:
        if given.refresh:
            for document in given.refresh:
                _refresh(document)
        elif why := print_all(tables(asked)):
            print(f"error: {why}", file=sys.stderr)
            return USAGE
    except (RowError, OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    return DONE


if __name__ == "__main__":
    sys.exit(main())
