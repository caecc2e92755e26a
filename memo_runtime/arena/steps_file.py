"""Addresses of steps on disk, so that the next run of the same program is served from its first step.

    {"memo_runtime": "steps", "schema_version": 2, "torch": "2.11.0+cu130", "device": "NVIDIA H100 80GB HBM3",
     "model": "1f0c...", "sha256": "99e1...",
     "kinds": {"ab34...": [{"tokens": 131072, "samples": [{"tokens": 65536, "default": [true], "trace": {...}}],
                            "placed": [0, 1], "offsets": [0, 512], "peak": 1024, "lower_bound": 1024,
                            "resident_bytes": 0, "seconds": 0.5, "seen": {"7": {"1999": 8192}}, "sizes": [512, 512]}]}}

Two samples are one program at two lengths. Sizes and lifetimes are those of the recorded steps, so a file holds nothing
of them a second time, except where other lengths said more (``seen``: bytes of a request, by its number and by tokens).
What is read is checked as a new plan is. Handles of streams mean nothing in another
process, but that of the default one: what other streams ask for is left to PyTorch's allocator there.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from memo_runtime.arena.lengths import Pair, Sample, pair_of
from memo_runtime.arena.placing import Placement
from memo_runtime.arena.solving import Solved
from memo_runtime.errors import AllocatorPlanError, TraceFileError
from memo_runtime.output import write_output
from memo_runtime.placement import PlacedRequest
from memo_runtime.planning.layout import layout_fault
from memo_runtime.traces.trace_file import trace_content, trace_from
from memo_runtime.traces.windows import is_within, last_step

SCHEMA_VERSION = 2
#: Handles that no stream has: of streams whose own ones are not known here.
_NOBODYS = 2**64 - 2
_AGAIN = "delete the file, and the next run records its steps again"

Kinds = Mapping[str, Sequence[Placement]]


def save_steps(path: str | os.PathLike[str], kinds: Kinds, *, model: str, device: str) -> None:
    """Write the placements of ``kinds``, by name, for a model of digest ``model`` on a device of that name.

    Raises:
        OutputError: the file cannot be written; what was there is untouched.
    """
    rows = {name: [_row(placement) for placement in placements] for name, placements in kinds.items()}
    content = {
        "memo_runtime": "steps", "schema_version": SCHEMA_VERSION, "torch": torch.__version__, "device": device,
        "model": model, "sha256": _digest(rows), "kinds": rows,
    }  # fmt: skip
    text = json.dumps(content, separators=(",", ":")).encode()
    write_output(path, gzip.compress(text, mtime=0) if Path(path).suffix == ".gz" else text + b"\n")


def load_steps(path: str | os.PathLike[str], *, model: str, device: str) -> dict[str, list[Placement]]:
    """The placements in ``path``, by kind; none where there is no such file yet.

    Raises:
        AllocatorPlanError: it is not whole, no such file, of another schema, torch, device or model, or holds what
            cannot be true; says which, and what to do.
    """
    if not Path(path).exists():
        return {}
    content = _read(path)
    for name, here, what in (
        ("schema_version", SCHEMA_VERSION, "this release reads schema version"),
        ("torch", torch.__version__, "the torch that is running is"),
        ("device", device, "this device is"),
        ("model", model, "this model (names, shapes and types of parameters) is"),
    ):
        if content.get(name) != here:
            raise AllocatorPlanError(f"{path}: {name} is {content.get(name)!r}, and {what} {here!r}: {_AGAIN}")
    kinds = content.get("kinds")
    if not isinstance(kinds, dict) or content.get("sha256") != _digest(kinds):
        raise AllocatorPlanError(f"{path} was changed after it was written: {_AGAIN}")
    try:
        return {name: [_placement(row) for row in rows] for name, rows in kinds.items()}
    except (AllocatorPlanError, TraceFileError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise AllocatorPlanError(f"{path} holds steps that cannot be ({said}): {_AGAIN}") from None


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        data = Path(path).read_bytes()
        content = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except OSError as error:  # a bad gzip file is one too
        raise AllocatorPlanError(f"cannot read {path}: {error.strerror or error}: {_AGAIN}") from error
    except (EOFError, zlib.error, ValueError, RecursionError) as error:
        raise AllocatorPlanError(f"{path} is not whole: {error}: {_AGAIN}") from error
    if not isinstance(content, dict) or content.get("memo_runtime") != "steps":
        raise AllocatorPlanError(f"{path} holds no steps: field 'memo_runtime' has to be 'steps'; name another file")
    return content


def _digest(rows: object) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _row(placement: Placement) -> dict[str, Any]:
    pair, solved = placement.pair, placement.solved
    samples = (placement.sample,) if pair is None else (pair.short, pair.long)
    return {
        "tokens": placement.tokens,
        "samples": [
            {"tokens": one.tokens, "default": [not handle for handle in one.handles], "trace": trace_content(one.trace)}
            for one in samples
        ],
        "placed": list(solved.placed), "offsets": [row.offset for row in solved.rows], "peak": solved.peak,
        "lower_bound": solved.lower_bound, "resident_bytes": solved.resident_bytes, "seconds": solved.seconds,
        "seen": {} if pair is None else {
            str(index): {str(tokens): size for tokens, size in known.items()} for index, known in pair.seen.items()
        },
        "sizes": [row.size for row in solved.rows] if pair is not None and pair.seen else [],
    }  # fmt: skip


def _seen(pair: Pair, row: dict[str, Any]) -> dict[int, dict[int, int]]:
    seen = {int(index): {int(t): size for t, size in known.items()} for index, known in row["seen"].items()}
    for index, known in seen.items():
        if not 0 <= index - pair.first < len(pair.sizes):
            raise AllocatorPlanError(f"request {index}, of which it knows other sizes, is not one of the step")
        if not all(isinstance(size, int) and size > 0 and tokens > 0 for tokens, size in known.items()):
            raise AllocatorPlanError(f"request {index} has a size or a length that is no positive number")
    return seen


def _placement(row: dict[str, Any]) -> Placement:
    samples = [_sample(one) for one in row["samples"]]
    pair = pair_of(*samples) if len(samples) > 1 else None
    if len(samples) > 1 and pair is None:
        raise AllocatorPlanError("its two recorded steps are not one program")
    sample = samples[-1] if pair is None else pair.long
    trace = sample.trace if pair is None else pair.at(row["tokens"])
    window, rows = last_step(trace), []
    sizes = row["sizes"] or [trace.requests[index].size for index in row["placed"]]
    if pair is not None:
        pair.seen = _seen(pair, row)
    for index, offset, size in zip(row["placed"], row["offsets"], sizes, strict=True):
        request = trace.requests[index]
        if index < 0 or not is_within(request, window):
            raise AllocatorPlanError(f"request {index} is not one that the step makes and frees")
        begin, end = request.lower - window.lower, request.upper - window.lower
        rows.append(PlacedRequest(id=f"r{index}", lower=begin, upper=end, size=size, offset=offset))
    fault = layout_fault(rows, row["peak"])
    if fault is not None:
        raise AllocatorPlanError(fault)
    solved = Solved(
        rows=tuple(rows), placed=tuple(row["placed"]), peak=row["peak"], lower_bound=row["lower_bound"],
        resident_bytes=row["resident_bytes"], seconds=row["seconds"],
    )  # fmt: skip
    return Placement(row["tokens"], sample, pair, solved)


def _sample(one: dict[str, Any]) -> Sample:
    handles = tuple(0 if default else _NOBODYS - at for at, default in enumerate(one["default"]))
    trace = trace_from(one["trace"], "a recorded step")
    if any(request.stream >= len(handles) for request in trace.requests):
        raise AllocatorPlanError(f"a recorded step has {len(handles)} streams, and requests of more")
    return Sample(tokens=one["tokens"], trace=trace, handles=handles)
