"""Reads a JSON list of objects one by one, keeping the line where each starts.

`json.loads` forgets positions; errors must name the line. The outer list (or
the "requests" member of the outer object) is walked here, and the standard
decoder reads each element at its place.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from memo_solver.errors import FileFormatError
from memo_solver.integers import read_integer


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonRow:
    """One object of the list and the line (from 1) where it starts."""

    values: dict[str, Any]
    line: int


class _RepeatedFieldError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _RepeatedFieldError("a field is given more than once")
    return values


class _Walker:
    """A position in the text of one file."""

    def __init__(self, text: str, path: str) -> None:
        self.text = text
        self.path = path
        self.at = 0
        self._decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_int=read_integer)
        self._counted_to = 0
        self._line = 1

    def line(self) -> int:
        """Line of the current position; counted onward from the last call."""
        self._line += self.text.count("\n", self._counted_to, self.at)
        self._counted_to = self.at
        return self._line

    def fail(self, message: str, field: str | None = None) -> FileFormatError:
        return FileFormatError(message, path=self.path, line=self.line(), field=field)

    def peek(self) -> str:
        """Next character that is no white space, or '' at the end."""
        while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
            self.at += 1
        return self.text[self.at : self.at + 1]

    def expect(self, allowed: str) -> str:
        found = self.peek()
        if not found or found not in allowed:
            wanted = " or ".join(f"'{c}'" for c in allowed)
            what = f"'{found}'" if found else "the end of the file"
            raise self.fail(f"not valid JSON: expected {wanted}, found {what}")
        self.at += 1
        return found

    def value(self) -> Any:  # noqa: ANN401 - any JSON value
        self.peek()
        try:
            found, self.at = self._decoder.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            raise FileFormatError(
                f"not valid JSON: {error.msg}", path=self.path, line=error.lineno, field=None
            ) from error
        except (RecursionError, ValueError) as error:
            text = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise self.fail(f"not usable JSON: {text}") from error
        return found


def read_json_rows(text: str, *, path: str) -> tuple[list[JsonRow], int | None]:
    """Return the objects of the list and the capacity, when the file names one."""
    walker = _Walker(text, path)
    start = walker.peek()
    if not start:
        return [], None
    if start == "[":
        rows = _rows(walker)
        capacity = None
    elif start == "{":
        rows, capacity = _members(walker)
    else:
        raise walker.fail("a list of requests or an object with 'requests' is needed")
    if walker.peek():
        raise walker.fail("there is text after the end of the JSON value")
    return rows, capacity


def _members(walker: _Walker) -> tuple[list[JsonRow], int | None]:
    rows: list[JsonRow] | None = None
    capacity: int | None = None
    seen: set[str] = set()
    walker.expect("{")
    separator = ","
    if walker.peek() == "}":
        separator = walker.expect("}")
    while separator == ",":
        name = walker.value()
        if not isinstance(name, str) or name in seen or name not in ("requests", "capacity"):
            raise walker.fail(
                f"unknown or repeated member {str(name)[:60]!r}; the members are requests, capacity"
            )
        seen.add(name)
        walker.expect(":")
        if name == "requests":
            rows = _rows(walker)
        else:
            capacity = walker.value()
            if capacity is not None and type(capacity) is not int:
                raise walker.fail(f"an integer is needed, got {str(capacity)[:60]}", "capacity")
        separator = walker.expect(",}")
    if rows is None:
        raise walker.fail("missing member", "requests")
    return rows, capacity


def _rows(walker: _Walker) -> list[JsonRow]:
    rows: list[JsonRow] = []
    walker.expect("[")
    separator = ","
    if walker.peek() == "]":
        separator = walker.expect("]")
    while separator == ",":
        if walker.peek() != "{":
            raise walker.fail(f"request {len(rows) + 1} is not an object")
        line = walker.line()
        rows.append(JsonRow(values=walker.value(), line=line))
        separator = walker.expect(",]")
    return rows
