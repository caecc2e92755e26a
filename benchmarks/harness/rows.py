"""Rows as JSON lines: one schema version per file, appended at once, never repeated.

A run may be interrupted at any moment. What is in the file is done; a line that was cut off while it was written
is dropped, and measured again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


def _parse(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RowError(f"{path}:{number} is not JSON: {error}") from error
    found = row.get("schema") if isinstance(row, dict) else None
    if found != SCHEMA:
        what = f"schema {found}" if found is not None else "no schema version"
        raise RowError(
            f"{path}:{number} has {what}, this harness reads and writes {SCHEMA}: they are not mixed, use another file"
        )
    assert isinstance(row, dict), "only a mapping has a schema"
    return row


def read_rows(path: Path) -> tuple[list[Row], int]:
    """(rows, bytes they take) of a file; bytes after them are a line that was cut off.

    Raises:
        RowError: a line that is whole and no row of this schema.
    """
    if not path.exists():
        return [], 0
    whole, newline, _ = path.read_bytes().rpartition(b"\n")
    lines = whole.decode("utf-8").split("\n") if newline else []
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)], len(whole) + len(newline)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep ``path`` for this process: two that write to it would double rows, or drop one that is being written.

    Raises:
        RowError: another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RowError(f"another run is writing to {path}: wait for its end, or give another --out") from None
        try:
            yield
        finally:
            if not path.stat().st_size:  # nothing was measured
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
            RowError: rows of another schema.
        """
        rows, size = read_rows(path)
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
                    raise RowError(
                        f"run '{self.run}' in {self.path} was measured with {name} = {row[name]!r}, here it is "
                        f"{conditions[name]!r}: rows of one run must be comparable. Give the new run another --run name"
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
            RowError: the run has this row already.
        """
        if self.find(row["contender"], row["seq_len"]) is not None:
            raise RowError(f"run '{self.run}' has a row of {row['contender']} at {row['seq_len']} already")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
