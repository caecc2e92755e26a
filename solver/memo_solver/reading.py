"""Reads problems and placements from CSV and JSON.

CSV is the field's format, one header line and one request a line:

    id,lower,upper,size[,alignment][,offset]

JSON is a list of objects with the same names, or {"requests": [...], "capacity": N}.
A file with offsets is a placement and is validated when read. An empty file is
a problem without requests. Every mistake is a `FileFormatError` with file, line
and field.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from dataclasses import dataclass
from pathlib import Path

from memo_solver.errors import FileFormatError, InputError
from memo_solver.integers import is_integer, read_integer, shown
from memo_solver.json_lines import JsonRow, read_json_rows
from memo_solver.records import MAX_VALUE, Placement, Problem, Request, is_text
from memo_solver.validator import find_violation

REQUIRED = ("id", "lower", "upper", "size")
OPTIONAL = ("alignment", "offset")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Content of one file: the problem, and the placement when it has offsets."""

    problem: Problem
    placement: Placement | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    request: Request
    offset: int | None
    line: int


def read_problem(path: str | Path, *, capacity: int | None = None) -> Problem:
    """Read a problem; `capacity` replaces the file's own (CSV files have none)."""
    return read_file(path, capacity=capacity).problem


def read_placement(path: str | Path) -> Placement:
    """Read and validate a placement; a file without offsets is an error."""
    loaded = read_file(path)
    if loaded.placement is None:
        raise FileFormatError(
            "no offsets: this is a problem, not a placement", path=str(path), line=1, field="offset"
        )
    return loaded.placement


def read_file(path: str | Path, *, capacity: int | None = None) -> Loaded:
    """Read a problem or placement by its suffix: .json is JSON, anything else CSV."""
    name = str(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileFormatError(
            f"cannot be read: {reason}", path=name, line=None, field=None
        ) from error
    return parse(data, path=name, capacity=capacity)


def parse(data: bytes, *, path: str, capacity: int | None = None) -> Loaded:
    """Parse the bytes of a file; `path` gives the format and the name for errors."""
    text = _decode(data, path)
    file_capacity: int | None = None
    if path.lower().endswith(".json"):
        json_rows, file_capacity = read_json_rows(text, path=path)
        rows = [_from_json(row, path) for row in json_rows]
    else:
        rows = _read_csv(text, path)
    return _assemble(rows, path, file_capacity if capacity is None else capacity)


def _decode(data: bytes, path: str) -> str:
    if data.startswith(b"\x1f\x8b"):
        raise FileFormatError("is compressed (gzip): unpack it first", path=path, line=None, field=None)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FileFormatError(
            f"not UTF-8 text (byte {data[error.start]:#04x})", path=path, line=line, field=None
        ) from error


def _read_csv(text: str, path: str) -> list[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] | None = None
    rows: list[_Row] = []
    line = 1
    try:
        for fields in reader:
            if fields and any(field.strip() for field in fields):
                if columns is None:
                    columns = _header(fields, path, line)
                else:
                    rows.append(_from_csv(fields, columns, path, line))
            line = reader.line_num + 1
    except csv.Error as error:
        message = f"not valid CSV: {error}"
        raise FileFormatError(message, path=path, line=line, field=None) from error
    return rows


def _header(fields: list[str], path: str, line: int) -> list[str]:
    columns = [field.strip() for field in fields]
    known = ", ".join((*REQUIRED, *(f"[{name}]" for name in OPTIONAL)))
    for name in columns:
        if name not in REQUIRED and name not in OPTIONAL:
            message = f"unknown column '{name[:60]}'{_meant(name)}; the columns are {known}"
            raise FileFormatError(message, path=path, line=line, field=name[:60])
        if columns.count(name) > 1:
            message = "column given more than once"
            raise FileFormatError(message, path=path, line=line, field=name)
    for name in REQUIRED:
        if name not in columns:
            message = f"missing column; the columns are {known}"
            raise FileFormatError(message, path=path, line=line, field=name)
    return columns


def _meant(name: str) -> str:
    """What the writer of an unknown column may have had in mind."""
    for delimiter, called in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if name.count(delimiter) >= len(REQUIRED) - 1:
            return f" (separated by {called}: commas are needed)"
    near = difflib.get_close_matches(name.lower(), (*REQUIRED, *OPTIONAL), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _from_csv(fields: list[str], columns: list[str], path: str, line: int) -> _Row:
    if len(fields) != len(columns):
        at = columns[len(fields)] if len(fields) < len(columns) else None
        message = f"{len(fields)} fields where the header has {len(columns)} columns"
        raise FileFormatError(message, path=path, line=line, field=at)
    values = dict(zip(columns, (field.strip() for field in fields), strict=True))
    numbers: dict[str, int | None] = {}
    for name in columns:
        if name == "id":
            continue
        value = values[name]
        if not value and name == "offset":
            numbers[name] = None
        elif not is_integer(value):
            message = f"an integer is needed, got '{value[:60]}'"
            raise FileFormatError(message, path=path, line=line, field=name)
        else:
            numbers[name] = read_integer(value)
    return _row(values["id"], numbers, path, line)



def _from_json(row: JsonRow, path: str) -> _Row:
    for name in row.values:
        if name not in REQUIRED and name not in OPTIONAL:
            message = "unknown field; the fields are " + ", ".join((*REQUIRED, *OPTIONAL))
            raise FileFormatError(message, path=path, line=row.line, field=name[:60])
    for name in REQUIRED:
        if name not in row.values:
            raise FileFormatError("missing field", path=path, line=row.line, field=name)
    identity = row.values["id"]
    if type(identity) is int:
        identity = str(identity)
    if not isinstance(identity, str):
        message = f"a text or an integer is needed, got {_brief(identity)}"
        raise FileFormatError(message, path=path, line=row.line, field="id")
    numbers: dict[str, int | None] = {}
    for name, value in row.values.items():
        if name == "id":
            continue
        if value is None and name == "offset":
            numbers[name] = None
        elif type(value) is int:
            numbers[name] = value
        else:
            message = f"an integer is needed, got {_brief(value)}"
            raise FileFormatError(message, path=path, line=row.line, field=name)
    return _row(identity, numbers, path, row.line)


def _brief(value: object) -> str:
    """A JSON value as JSON writes it, cut short."""
    return json.dumps(value)[:60]


def _row(identity: str, numbers: dict[str, int | None], path: str, line: int) -> _Row:
    """Check ranges here, field by field, so that the error can name the field."""

    def fail(field: str, message: str) -> FileFormatError:
        return FileFormatError(message, path=path, line=line, field=field)

    if not identity:
        raise fail("id", "an id is needed")
    if not is_text(identity):
        raise fail("id", f"{ascii(identity)[:60]} holds half a character (a lone surrogate)")
    given = {name: value for name, value in numbers.items() if value is not None}
    for name, value in given.items():
        if not -MAX_VALUE <= value <= MAX_VALUE:
            raise fail(name, f"{shown(value)} does not fit in 64 bits (at most 2^63 - 1)")
    if given["size"] < 0:
        raise fail("size", f"size {given['size']} is negative")
    if given["upper"] < given["lower"]:
        raise fail("upper", f"upper {given['upper']} is below lower {given['lower']}")
    if given.get("alignment", 1) < 1:
        raise fail("alignment", f"alignment {given['alignment']} is below 1")
    request = Request(
        id=identity,
        lower=given["lower"],
        upper=given["upper"],
        size=given["size"],
        alignment=given.get("alignment", 1),
    )
    return _Row(request=request, offset=given.get("offset"), line=line)


def _assemble(rows: list[_Row], path: str, capacity: int | None) -> Loaded:
    lines: dict[str, int] = {}
    for row in rows:
        if row.request.id in lines:
            message = f"id '{row.request.id[:60]}' was already used in line {lines[row.request.id]}"
            raise FileFormatError(message, path=path, line=row.line, field="id")
        lines[row.request.id] = row.line
    try:
        problem = Problem(requests=tuple(row.request for row in rows), capacity=capacity)
    except InputError as error:
        raise FileFormatError(str(error), path=path, line=None, field="capacity") from error
    missing = [row for row in rows if row.offset is None]
    if missing and len(missing) < len(rows):
        message = "some requests have an offset and this one has none"
        raise FileFormatError(message, path=path, line=missing[0].line, field="offset")
    if missing or not rows:
        return Loaded(problem=problem, placement=None)
    offsets = tuple(row.offset for row in rows if row.offset is not None)
    # The placement is judged on its own; whether it fits a capacity is the solver's question.
    violation = find_violation(Problem(requests=problem.requests), offsets)
    if violation is not None:
        line = lines[violation.request_ids[0]] if violation.request_ids else None
        message = f"broken rule: {violation.rule.value}; {violation.detail}"
        raise FileFormatError(message, path=path, line=line, field="offset")
    return Loaded(problem=problem, placement=Placement(problem=problem, offsets=offsets))
