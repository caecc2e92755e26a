"""Profiles and plans as JSON files.

One small codec driven by the type hints of the records: a field is written as what it is, and read back only
if the file has exactly the fields the record has, each with the right type and a value that can be true. Round trips
are exact, floats included. The first key of a file says what it holds:

    {"memo_runtime": "plan", "policy": "memo", "alpha": 0.5, "profile": {...}, ..., "schema_version": 1}
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from memo_runtime.errors import ArgumentTypeError, PlanFileError
from memo_runtime.output import file_path, write_output
from memo_runtime.records import SCHEMA_VERSION, Plan, Profile
from memo_runtime.soundness import find_fault
from memo_runtime.units import show_value

_Record = TypeVar("_Record", bound=Plan | Profile)

_KIND = "memo_runtime"
_RECORDS: dict[str, type[Plan] | type[Profile]] = {"plan": Plan, "profile": Profile}
#: JSON has no words for these; they are written as text.
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def save(value: Plan | Profile, path: str | os.PathLike[str]) -> None:
    """Writes a profile or plan to ``path``, as ``output.write_output`` does.

    Raises:
        ArgumentTypeError: ``value`` is neither, or ``path`` names no file.
        OutputError: the file cannot be written; what was there is untouched.
    """
    if not isinstance(value, (Plan, Profile)):
        raise ArgumentTypeError(
            f"save writes a plan or a profile and got {show_value(value)} ({type(value).__name__}): give what "
            "memo.plan or memo.profile returned"
        )
    content = {_KIND: type(value).__name__.lower(), **_encode(value)}
    write_output(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def load(path: str | os.PathLike[str]) -> Plan | Profile:
    """The profile or plan in ``path``, whichever it is.

    Raises:
        PlanFileError: as for ``load_plan``.
    """
    content = _read(path)
    wanted: type[Plan | Profile] = _RECORDS[_kind(content, path)]
    return _build(wanted, content, path)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in ``path``.

    Raises:
        PlanFileError: no such file, not JSON, not a plan, another schema version, or a field that is missing,
            unknown, of the wrong type or out of range; the message names the file and the field.
    """
    return _load_as(Plan, path)


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """The profile in ``path``.

    Raises:
        PlanFileError: as for ``load_plan``.
    """
    return _load_as(Profile, path)


def _load_as(wanted: type[_Record], path: str | os.PathLike[str]) -> _Record:
    content = _read(path)
    kind = _kind(content, path)
    if _RECORDS[kind] is not wanted:
        raise PlanFileError(f"{path} holds a {kind}, not a {wanted.__name__.lower()}")
    return _build(wanted, content, path)


def _build(wanted: type[_Record], content: dict[str, Any], path: str | os.PathLike[str]) -> _Record:
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise PlanFileError(
            f"{path}: field 'schema_version' is {_show(version)}, and this release reads {SCHEMA_VERSION}; "
            "make the file again with the installed release"
        )
    values = {name: value for name, value in content.items() if name != _KIND}
    try:
        result = _decode(wanted, values, "")
    except _FieldError as error:
        raise PlanFileError(f"{path}: {error}") from None
    assert isinstance(result, wanted)
    fault = find_fault(result)
    if fault is not None:
        raise PlanFileError(f"{path}: {_wrong(fault.where, fault.value, fault.expected)}")
    return result


#: Where a file that ends too early stops making sense: at its end, or in a word or number that is not whole.
_CUT = re.compile(r"|t|tr|tru|f|fa|fal|fals|n|nu|nul|-|\.|(\.\d+)?[eE][+-]?")


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    file = file_path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanFileError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise PlanFileError(f"{path} is not a profile or plan: it is no text (byte {error.start})") from error
    try:
        content = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        cut = _CUT.fullmatch(text[error.pos :].rstrip()) or error.msg.startswith("Unterminated")
        what = "ends too early" if cut else f"is not JSON: {error.msg}"
        raise PlanFileError(f"{path} {what} ({at})") from error
    except (_FieldError, RecursionError) as error:
        raise PlanFileError(f"{path} is not a profile or plan: {error}") from None
    if not isinstance(content, dict):
        what = f"{_show(content)} instead of an object"
        raise PlanFileError(f"{path} is not a profile or plan: it holds {what}")
    return content


def _kind(content: Mapping[str, Any], path: str | os.PathLike[str]) -> str:
    kind = content.get(_KIND)
    if not isinstance(kind, str) or kind not in _RECORDS:
        found = "is missing" if _KIND not in content else f"is {_show(kind)}"
        expected = " or ".join(f"'{name}'" for name in _RECORDS)
        raise PlanFileError(f"{path} is not a profile or plan: field '{_KIND}' {found}; expected {expected}")
    return kind


class _FieldError(Exception):
    """A field of a file is not what the record says; becomes a ``PlanFileError`` with the file's name."""


def _refuse_constant(name: str) -> float:
    raise _FieldError(f"it has the number {name}, which JSON does not know")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _FieldError(f"field '{twice}' is there twice")
    return result


@cache
def _hints(record: type) -> dict[str, Any]:
    hints = get_type_hints(record)
    return {field.name: hints[field.name] for field in fields(record)}


def _encode(value: Any) -> Any:
    # Enums first: a StrEnum is a str too.
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    record: Any = type(value)
    return {name: _encode(getattr(value, name)) for name in _hints(record)}


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        (inner,) = (option for option in get_args(hint) if option is not NoneType)
        return None if value is None else _decode(inner, value, where)
    if origin is tuple:
        return _decode_tuple(get_args(hint), value, where)
    if hint is float:
        return _decode_float(value, where)
    if hint in (bool, int, str):
        # bool is a kind of int in Python, but not in a file.
        if type(value) is not hint:
            raise _wrong(where, value, hint.__name__)
        return value
    if issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError:
            raise _wrong(where, value, "one of " + ", ".join(str(item.value) for item in hint)) from None
    return _decode_record(hint, value, where)


def _decode_float(value: Any, where: str) -> int | float:
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(where, value, "number")
    return value


def _decode_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong(where, value, "list")
    item = arguments[0]  # the records only have tuple[X, ...]
    return tuple(_decode(item, entry, f"{where}[{index}]") for index, entry in enumerate(value))


def _decode_record(record: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, value, "object")
    hints = _hints(record)
    for name in value:
        if name not in hints:
            raise _FieldError(f"field '{_join(where, name)}' is unknown to this release")
    for name in hints:
        if name not in value:
            raise _FieldError(f"field '{_join(where, name)}' is missing")
    return record(**{name: _decode(hint, value[name], _join(where, name)) for name, hint in hints.items()})


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _wrong(where: str, value: Any, expected: str) -> _FieldError:
    return _FieldError(f"field '{where}' is {_show(value)}; expected {expected}")


def _show(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", NoneType: "null"}
    if type(value) in kinds:
        return kinds[type(value)]
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
