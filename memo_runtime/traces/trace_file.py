"""``trace.json``: a trace as columns of integers, gzipped where the name ends in ``.gz``.

    {"memo_runtime": "trace", "schema_version": 1, "ticks": 6,
     "requests": {"lower": [0, 1, 2], "lifetime": [2, 3, 3], "size": [512, 4096, 512], "stream": [0, 0, 0]},
     "spans": [{"phase": "step", "block": "", "lower": 0, "upper": 6}], "releases": [],
     "segments": {"address": [0], "size": [2097152]},
     "measured": {"allocated_peak": 8192, "reserved_peak": 2097152, "retries": 0, "num_segments": 1},
     "expandable": false, "capacity_bytes": 0, "provenance": {"model": "llama-8b"}}

``lower`` holds the distance from the row before, as allocations follow one another closely; ``lifetime`` is upper
- lower. ``measured`` is null where no allocator was asked, ``segments`` empty where addresses are not known. A file is
replaced as a whole.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memo_runtime.errors import TraceFileError
from memo_runtime.output import file_path, write_output
from memo_runtime.traces.trace import Measured, Phase, Span, Trace, TraceRequest

SCHEMA_VERSION = 1

_COLUMNS = ("lower", "lifetime", "size", "stream")
_MEASURED = ("allocated_peak", "reserved_peak", "retries", "num_segments")
_FIELDS = (
    "memo_runtime", "schema_version", "ticks", "requests", "spans", "releases", "segments", "measured",
    "expandable", "capacity_bytes", "provenance",
)  # fmt: skip


def save_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Writes ``trace`` to ``path``, as ``output.write_output`` does.

    Raises:
        OutputError: the file cannot be written; what was there is untouched.
    """
    target = file_path(path)
    text = json.dumps(trace_content(trace), separators=(",", ":")).encode()
    # Without a time of its own, the same trace is the same file.
    data = gzip.compress(text, mtime=0) if target.suffix == ".gz" else text + b"\n"
    write_output(target, data)


def trace_content(trace: Trace) -> dict[str, Any]:
    """What a file holds of ``trace``."""
    lowers = [request.lower for request in trace.requests]
    measured = trace.measured
    return {
        "memo_runtime": "trace",
        "schema_version": SCHEMA_VERSION,
        "ticks": trace.ticks,
        "requests": {
            "lower": [b - a for a, b in itertools.pairwise([0, *lowers])],
            "lifetime": [request.upper - request.lower for request in trace.requests],
            "size": [request.size for request in trace.requests],
            "stream": [request.stream for request in trace.requests],
        },
        "spans": [{"phase": s.phase.value, "block": s.block, "lower": s.lower, "upper": s.upper} for s in trace.spans],
        "releases": list(trace.releases),
        "segments": {
            "address": [address for address, _ in trace.segments],
            "size": [size for _, size in trace.segments],
        },
        "measured": None if measured is None else {name: getattr(measured, name) for name in _MEASURED},
        "expandable": trace.expandable,
        "capacity_bytes": trace.capacity_bytes,
        "provenance": trace.provenance,
    }


def load_trace(path: str | os.PathLike[str]) -> Trace:
    """The trace in ``path``.

    Raises:
        TraceFileError: no such file, not JSON, no trace, another schema version, or a field that is missing, unknown,
            of the wrong type, or cannot be true; the message names the file and the field.
    """
    return trace_from(_read(path), str(path))


def trace_from(content: Mapping[str, Any], where: str) -> Trace:
    """The trace that a file holds as ``content``.

    Raises:
        TraceFileError: a field is missing, unknown, of the wrong type, or cannot be true; names ``where`` and it.
    """
    try:
        return _build(content)
    except _FieldError as error:
        raise TraceFileError(f"{where}: {error}") from None


class _FieldError(Exception):
    """A field is not what it has to be; becomes a ``TraceFileError`` with the file's name."""


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TraceFileError(f"{path} is not whole: {error}; record or copy it again") from error
    except OSError as error:
        raise TraceFileError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TraceFileError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("memo_runtime") != "trace":
        raise TraceFileError(f"{path} is not a trace: field 'memo_runtime' has to be 'trace'")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise TraceFileError(
            f"{path}: field 'schema_version' is {version!r}, and this release reads {SCHEMA_VERSION}; record it again"
        )
    return content


def _build(content: Mapping[str, Any]) -> Trace:
    _same_names(content, _FIELDS, "")
    columns = _mapping(content, "requests", "")
    _same_names(columns, _COLUMNS, "requests.")
    lower, lifetime, size, stream = (_integers(columns, name, "requests.") for name in _COLUMNS)
    if len({len(lower), len(lifetime), len(size), len(stream)}) > 1:
        raise _FieldError("the columns of field 'requests' have different lengths")
    rows = zip(itertools.accumulate(lower), lifetime, size, stream, strict=True)
    spans = content["spans"]
    if not isinstance(spans, list):
        raise _FieldError("field 'spans' is no list")
    words = _mapping(content, "provenance", "")
    if not all(isinstance(value, str) for value in words.values()):
        raise _FieldError("field 'provenance' has a value that is no text")
    if not isinstance(content["expandable"], bool):
        raise _FieldError("field 'expandable' is neither true nor false")
    trace = Trace(
        ticks=_integer(content, "ticks", ""),
        requests=tuple(TraceRequest(a, a + life, number, own) for a, life, number, own in rows),
        spans=tuple(_span(entry, f"spans[{index}]") for index, entry in enumerate(spans)),
        releases=tuple(_integers(content, "releases", "")),
        segments=_segments(_mapping(content, "segments", "")),
        measured=_measured(content["measured"]),
        expandable=content["expandable"],
        capacity_bytes=_integer(content, "capacity_bytes", ""),
        provenance=dict(words),
    )
    fault = trace.fault()
    if fault is not None:
        raise _FieldError(fault)
    return trace


def _span(entry: Any, where: str) -> Span:
    if not isinstance(entry, dict):
        raise _FieldError(f"field '{where}' is no object")
    _same_names(entry, ("phase", "block", "lower", "upper"), f"{where}.")
    phases = [phase.value for phase in Phase]
    if entry["phase"] not in phases or not isinstance(entry["block"], str):
        raise _FieldError(f"field '{where}' has no phase of {', '.join(phases)}, or no text as block")
    dot = f"{where}."
    return Span(Phase(entry["phase"]), entry["block"], _integer(entry, "lower", dot), _integer(entry, "upper", dot))


def _segments(columns: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    _same_names(columns, ("address", "size"), "segments.")
    addresses, sizes = (_integers(columns, name, "segments.") for name in ("address", "size"))
    if len(addresses) != len(sizes):
        raise _FieldError("the columns of field 'segments' have different lengths")
    return tuple(zip(addresses, sizes, strict=True))


def _measured(value: Any) -> Measured | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _FieldError("field 'measured' is neither null nor an object")
    _same_names(value, _MEASURED, "measured.")
    return Measured(**{name: _integer(value, name, "measured.") for name in _MEASURED})


def _same_names(found: Mapping[str, Any], expected: tuple[str, ...], where: str) -> None:
    for name in expected:
        if name not in found:
            raise _FieldError(f"field '{where}{name}' is missing")
    for name in found:
        if name not in expected:
            raise _FieldError(f"field '{where}{name}' is unknown to this release")


def _mapping(found: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    value = found[name]
    if not isinstance(value, dict):
        raise _FieldError(f"field '{where}{name}' is no object")
    return value


def _integer(found: Mapping[str, Any], name: str, where: str) -> int:
    value = found[name]
    if type(value) is not int or value < 0:
        raise _FieldError(f"field '{where}{name}' is {value!r}; expected a whole number of at least 0")
    return value


def _integers(found: Mapping[str, Any], name: str, where: str) -> list[int]:
    value = found[name]
    if not isinstance(value, list):
        raise _FieldError(f"field '{where}{name}' is no list")
    wrong = next((index for index, item in enumerate(value) if type(item) is not int or item < 0), None)
    if wrong is not None:
        raise _FieldError(f"field '{where}{name}[{wrong}]' is {value[wrong]!r}; expected a whole number of at least 0")
    return value
