"""Rows as JSON lines: one schema version per file, appended at once, never repeated.

A run may be interrupted at any moment. What is in the file is done; a line that was cut off while it was written
is dropped, and measured again. What is no file of rows is refused and stays as it is.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memo_runtime.units import show_value

#: Version of the fields of a row. 1: the first.
SCHEMA = 1
#: In place of a contender's name: no contender, but the gradients that those of all are compared with.
REFERENCE = "reference"
#: ``skipped``: the contender is not installed, or not made for this; ``error`` has the line that installs it.
STATUSES = ("ok", "oom", "error", "skipped")
#: What every row has; ``make_row`` fills what a contender could not measure with None.
FIELDS = (
    "schema", "run", "contender", "geometry", "scope", "blocks", "seq_len", "status", "error",
    "step_seconds", "p20", "p80", "n", "warm_up", "warm_up_seconds", "first_step_seconds", "seconds",
    "model_flops", "recomputed_flops", "mfu", "hfu",
    "peak_allocated", "peak_reserved", "first_peak_allocated", "host_rss", "pinned_bytes",
    "budget", "budget_from", "host_budget", "gradient_norm", "gradient_difference", "gradient_sketch", "details",
    "rehearsed", "config", "gpu", "driver", "cpu", "cores", "commit", "date", "versions",
)  # fmt: skip
#: What must agree between the rows of one run: without that they are not comparable.
RUN_FIELDS = ("geometry", "scope", "blocks", "config", "gpu", "driver", "cpu", "cores", "commit", "versions")
#: What rows of this schema did not have at first.
_ADDED = ("gradient_sketch", "rehearsed")
#: What a reader takes for granted of some of them; and of others, where there is anything.
_KINDS: dict[str, type] = {
    "run": str, "contender": str, "geometry": str, "scope": str, "seq_len": int, "config": dict, "versions": dict,
    "commit": str,
}  # fmt: skip
_OPTIONAL: dict[str, type] = {
    "error": str, "details": dict, "gpu": str, "cpu": str, "gradient_sketch": str,
    **dict.fromkeys(("step_seconds", "p20", "p80", "mfu", "hfu", "first_step_seconds", "gradient_difference"), float),
    **dict.fromkeys(("blocks", "n", "peak_allocated", "peak_reserved", "host_rss", "pinned_bytes", "budget"), int),
}  # fmt: skip
#: What a table names of the conditions of a run.
_INSIDE = (("config", "dtype"), ("config", "attention"), ("versions", "torch"))
#: What every contender's row has that is ok; a rehearsed one all but the first.
_MEASURED = ("step_seconds", "peak_allocated")
#: How every row begins: what is at the end of a file and begins otherwise was not cut off by a run.
_BEGINNING = f'{{"schema": {SCHEMA}, "run": '.encode()
#: As much of it as tells a row where there is no other.
_TELLS = len('{"schema": ')

Row = dict[str, Any]


class RowError(ValueError):
    """A file of rows cannot be used: another schema, another run's conditions, or no rows at all."""


def of_contenders(rows: Iterable[Row]) -> list[Row]:
    """``rows`` without the reference of their gradients."""
    return [row for row in rows if row["contender"] != REFERENCE]


def make_row(values: Row) -> Row:
    """A row with every field, in their order.

    Raises:
        RowError: a field that rows do not have, or a status that there is not.
    """
    unknown = set(values) - set(FIELDS)
    if unknown:
        raise RowError(f"rows of schema {SCHEMA} have no field {sorted(unknown)[0]!r}")
    row = {name: values.get(name) for name in FIELDS} | {"schema": SCHEMA}
    if row["status"] not in STATUSES:
        raise RowError(f"status {row['status']!r} is unknown; there are: {', '.join(STATUSES)}")
    return row


@contextmanager
def _said(doing: str, path: Path) -> Iterator[None]:
    """What the system refuses as one message.

    Raises:
        RowError: an ``OSError`` inside.
    """
    try:
        yield
    except OSError as error:
        raise RowError(f"cannot {doing} {path}: {error.strerror or error}") from error


def _parse(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RowError(f"{path}:{number} is not JSON: {error}") from error
    found = row.get("schema") if isinstance(row, dict) else None
    if type(found) is not int or found != SCHEMA:
        what = f"schema {json.dumps(found)}" if found is not None else "no schema version"
        raise RowError(
            f"{path}:{number} has {what}, this harness reads and writes {SCHEMA}: they are not mixed, use another file"
        )
    assert isinstance(row, dict), "only a mapping has a schema"
    missing = [name for name in FIELDS if name not in row and name not in _ADDED]
    if missing:
        raise RowError(f"{path}:{number} is no row of this harness, it has no field {missing[0]!r}: use another file")
    if (name := _odd(row)) is not None:
        outer, _, inner = name.partition(".")
        value = show_value(row[outer].get(inner) if inner else row[outer])
        raise RowError(f"{path}:{number} is no row of this harness, its {name} is {value}: use another file")
    return row


def _odd(row: Row) -> str | None:
    """The first field of ``row`` whose value no run would have written; None: there is none."""
    kinds = {**_KINDS, **{name: kind for name, kind in _OPTIONAL.items() if row.get(name) is not None}}
    for name, kind in kinds.items():
        if not _is(row[name], kind):
            return name
    if row["status"] not in STATUSES:
        return "status"
    for outer, inner in _INSIDE:
        if not isinstance(row[outer].get(inner), str):
            return f"{outer}.{inner}"
    if row["status"] == "ok" and row["contender"] != REFERENCE:
        needed = _MEASURED[1:] if row.get("rehearsed") else _MEASURED
        for name in needed:
            if row[name] is None or not 0 < row[name] < math.inf:
                return name
    return None if row["seq_len"] > 0 else "seq_len"


def _is(value: object, kind: type) -> bool:
    """Whether a value of JSON is of ``kind``: true is no number, and a whole number is a float too."""
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def differing(first: object, other: object) -> tuple[object, object]:
    """Of two mappings what differs in each; anything else as it is."""
    if not isinstance(first, dict) or not isinstance(other, dict):
        return first, other
    names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    mine, theirs = ({name: one[name] for name in names if name in one} for one in (first, other))
    return mine, theirs


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _begins(text: bytes, *, alone: bool) -> bool:
    """Whether ``text`` is the beginning of a row; behind other rows one may be cut off within its first word."""
    return text.startswith(_BEGINNING) or (_BEGINNING.startswith(text) and not (alone and len(text) < _TELLS))


def exists(path: Path) -> bool:
    """Whether ``path`` is there.

    Raises:
        RowError: it is no regular file, or nothing can be there.
    """
    try:
        with _said("use", path):
            mode = path.stat().st_mode
    except RowError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return False
        raise
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
        raise RowError(f"cannot use {path}: it is {what}; rows are kept in a regular file")
    return True


def read_rows(path: Path) -> tuple[list[Row], int]:
    """(rows, bytes they take) of a file; bytes after them are the beginning of a row that was cut off.

    A last row is one without its newline too.

    Raises:
        RowError: a line that is no row of this schema, or the file cannot be read.
    """
    if not exists(path):
        return [], 0
    with _said("read", path):
        found = path.read_bytes()
    lines = found.split(b"\n")
    last = lines.pop()
    size = len(found) - len(last)
    if last and _is_json(last):
        lines.append(last)
        size = len(found)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError(f"{path}:{number} is not UTF-8, so this is no file of rows: use another file") from error
        rows.append(_parse(path, number, text))
    if size < len(found) and not _begins(last, alone=not rows):
        raise RowError(
            f"{path}:{len(lines) + 1} is no row, nor the beginning of one that was cut off: nothing was changed, "
            "use another file"
        )
    return rows, size


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep ``path`` for this process: two that write to it would double rows, or drop one that is being written.

    Raises:
        RowError: another process has it, or it cannot be written to.
    """
    created = not exists(path)
    with _said("write to", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A link to nothing is there, and is not made by this.
        created = created and not path.is_symlink()
        file = path.open("ab")
    with file:
        with _said("lock", path):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RowError(f"another run is writing to {path}: wait for its end, or give another --out") from None
        try:
            yield
        finally:
            with suppress(OSError):
                mine = os.fstat(file.fileno())
                if created and not mine.st_size and os.path.samestat(mine, path.lstat()):  # nothing was measured
                    path.unlink()


@dataclass(slots=True)
class RowFile:
    """The rows of one run in a file that may hold others.

    Attributes:
        cut_off: bytes of an unfinished line that were dropped when the file was opened.
    """

    path: Path
    run: str
    rows: list[Row] = field(default_factory=list)
    cut_off: int = 0

    @classmethod
    def open(cls, path: Path, run: str) -> RowFile:
        """The file with what it holds of ``run``.

        Raises:
            RowError: rows of another schema, or no file of rows.
        """
        rows, size = read_rows(path)
        with _said("write to", path):
            cut_off = path.stat().st_size - size if path.exists() else 0
            if cut_off:
                os.truncate(path, size)
        return cls(path, run, [row for row in rows if row["run"] == run], cut_off)

    def check_conditions(self, conditions: Row) -> None:
        """That this process measures under the conditions of the rows that are there.

        Raises:
            RowError: a condition differs; names it.
        """
        for row in self.rows:
            for name in RUN_FIELDS:
                if row[name] != conditions[name]:
                    there, here = differing(row[name], conditions[name])
                    raise RowError(
                        f"run '{self.run}' in {self.path} was measured with {name} = {there!r}, here it is {here!r}: "
                        "rows of one run must be comparable. Give the new run another --run name"
                    )

    def find(self, contender: str, tokens: int) -> Row | None:
        """The row of ``contender`` at ``tokens``, if it is there."""
        return next((row for row in self.of(contender) if row["seq_len"] == tokens), None)

    def of(self, contender: str) -> list[Row]:
        """All rows of ``contender``."""
        return [row for row in self.rows if row["contender"] == contender]

    def append(self, row: Row) -> None:
        """Write a row, through to the disk.

        Raises:
            RowError: the run has this row already, or it cannot be written.
        """
        if self.find(row["contender"], row["seq_len"]) is not None:
            raise RowError(f"run '{self.run}' has a row of {row['contender']} at {row['seq_len']} already")
        line = json.dumps(row).encode("utf-8") + b"\n"
        with _said("write to", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else b"\n" + line
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self.rows.append(row)
