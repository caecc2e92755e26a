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
from typing import Any

from benchmarks.harness.rows import RUN_FIELDS, Row, RowError, of_contenders, read_rows
from benchmarks.harness.side_by_side import Comparison, markdown
from benchmarks.harness.table import run_table
from memo_runtime.output import print_all, write_output
from memo_runtime.units import parse_tokens

DONE, USAGE = 0, 2
_BLOCK = re.compile(
    r"(?P<start><!-- memo bench table (?P<command>.*?) -->\n).*?(?P<stop><!-- end of the table -->)", re.DOTALL
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
        rows = of_contenders(whole)
        for name in dict.fromkeys(row["run"] for row in rows):
            mine = tuple(row for row in rows if row["run"] == name)
            _check(path, mine)
            found.append(Comparison(path.as_posix(), mine))
    if not found:
        raise RowError(f"no rows in {', '.join(str(path) for path in files)}")
    return found


def _check(path: Path, rows: Sequence[Row]) -> None:
    """That the rows of one run are comparable, and each there once."""
    first, seen = rows[0], set()
    for row in rows:
        for name in (*RUN_FIELDS, "rehearsed"):
            if (row.get(name) or None) != (first.get(name) or None):
                raise RowError(
                    f"{path}: run '{row['run']}' has rows with {name} = {first.get(name)!r} and {row.get(name)!r}, "
                    "which are not comparable"
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
        _known("GPU", given.gpu, [str(one.first["gpu"]) for one in chosen])
        chosen = [one for one in chosen if str(one.first["gpu"]) == given.gpu]
    kept: dict[str, frozenset[Any]] = {}
    if given.contenders is not None:
        kept["contender"] = frozenset(part.strip() for part in given.contenders.split(","))
    if given.lengths is not None:
        try:
            kept["length"] = frozenset(parse_tokens(part) for part in given.lengths.split(","))
        except ValueError as error:
            raise RowError(f"--lengths: {error}") from None
    for what, wanted in kept.items():
        field = {"length": "seq_len"}.get(what, what)
        for value in sorted(wanted):
            _known(what, value, sorted({row[field] for one in chosen for row in one.rows}))
    return [replace(one, shown=kept.get("contender"), shown_lengths=kept.get("length")) for one in chosen]


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
    given = _parser().parse_args(arguments)
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
    return "\n\n".join(run_table([row for row in one.rows if one.shows(row["contender"])]) for one in chosen) + "\n"


def refreshed(document: Path, root: Path) -> str:
    """``document`` with its tables made again by the commands that stand at them, which name files from ``root``.

    Raises:
        RowError: as in ``tables``, or it has no such table.
    """

    def again(block: re.Match[str]) -> str:
        made = tables(shlex.split(block["command"]), root=root, document=document)
        return f"{block['start']}{made}{block['stop']}"

    text, count = _BLOCK.subn(again, document.read_text(encoding="utf-8"))
    if not count:
        raise RowError(f"{document}: no table of it has its command beside it")
    return text


def _refresh(document: Path) -> None:
    if not document.is_file():
        raise RowError(f"--refresh {document}: there is no such document")
    after = refreshed(document.resolve(), _root(document))
    changed = after != document.read_text(encoding="utf-8")
    if changed:
        write_output(document, after.encode("utf-8"))
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
    try:
        if given.refresh:
            for document in given.refresh:
                _refresh(document)
        elif why := print_all(tables(asked)):
            print(f"error: {why}", file=sys.stderr)
            return USAGE
    except RowError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    return DONE


if __name__ == "__main__":
    sys.exit(main())
