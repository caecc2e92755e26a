"""Writes placements; a half-written file never replaces a good one.

The text goes to a temporary file in the same folder, is flushed to the disk,
and takes the name in one step (`os.replace`), which is atomic on POSIX. A link
is followed, so that it stays a link; a device or pipe is written to, never replaced.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import tempfile
from pathlib import Path

from memo_solver.errors import InputError
from memo_solver.records import MAX_VALUE, Placement, Problem

_MAX_LINKS = 40
_OPEN_FILES = re.compile(r"/proc/\d+(/task/\d+)?/fd")
"""Where the system lists the open files of a program: /dev/stdout leads there."""


def format_csv(problem: Problem, offsets: tuple[int, ...] | None = None) -> str:
    """Text of the CSV file: alignment only when one is not 1, offset when given.

    Raises:
        InputError: an id or offset would not be read back as it is.
    """
    check_offsets(problem, offsets)
    blank = next((r.id for r in problem.requests if r.id != r.id.strip()), None)
    if blank is not None:
        raise InputError(f"id {blank!r} begins or ends with a blank, which CSV files lose: write a .json file")
    with_alignment = any(r.alignment != 1 for r in problem.requests)
    header = ["id", "lower", "upper", "size"]
    header += ["alignment"] if with_alignment else []
    header += ["offset"] if offsets is not None else []
    buffer = io.StringIO()
    # A carriage return alone is not quoted by every release of Python.
    returns = any("\r" in r.id for r in problem.requests)
    writer = csv.writer(
        buffer, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
    )
    writer.writerow(header)
    for i, r in enumerate(problem.requests):
        row: list[str | int] = [r.id, r.lower, r.upper, r.size]
        if with_alignment:
            row.append(r.alignment)
        if offsets is not None:
            row.append(offsets[i])
        writer.writerow(row)
    return buffer.getvalue()


def format_json(problem: Problem, offsets: tuple[int, ...] | None = None) -> str:
    """Text of the JSON file, one request a line.

    Raises:
        InputError: an offset would not be read back.
    """
    check_offsets(problem, offsets)
    lines = []
    for i, r in enumerate(problem.requests):
        row: dict[str, str | int] = {
            "id": r.id, "lower": r.lower, "upper": r.upper, "size": r.size,
            "alignment": r.alignment,
        }  # fmt: skip
        if offsets is not None:
            row["offset"] = offsets[i]
        lines.append("  " + json.dumps(row))
    capacity = json.dumps(problem.capacity)
    return f'{{"capacity": {capacity}, "requests": [\n' + ",\n".join(lines) + "\n]}\n"


def check_offsets(problem: Problem, offsets: tuple[int, ...] | None) -> None:
    """Whatever is written holds signed 64-bit numbers, which sums of sizes may exceed.

    Raises:
        InputError: an offset does.
    """
    for request, offset in zip(problem.requests, offsets or (), strict=False):
        if offset > MAX_VALUE:
            raise InputError(f"request '{request.id}': offset {offset} does not fit in 64 bits: use a larger unit")


def write_problem(problem: Problem, path: str | Path) -> None:
    """Write a problem without offsets; .json is JSON, anything else CSV."""
    json_wanted = str(path).lower().endswith(".json")
    write_atomically(path, format_json(problem) if json_wanted else format_csv(problem))


def write_placement(placement: Placement, path: str | Path) -> None:
    """Write a placement; .json is JSON, anything else CSV."""
    json_wanted = str(path).lower().endswith(".json")
    form = format_json if json_wanted else format_csv
    write_atomically(path, form(placement.problem, placement.offsets))


def check_writable(path: str | Path) -> None:
    """Raise before the work begins when `path` cannot be written."""
    try:
        _check(path, _target(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _check(path: str | Path, target: Path) -> None:
    if target.is_dir():
        raise InputError(f"{path}: cannot be written: it is a folder")
    if _is_stream(target):
        if not os.access(target, os.W_OK):
            raise InputError(f"{path}: cannot be written: no permission")
        return
    if not target.parent.is_dir():
        raise InputError(f"{path}: cannot be written: there is no folder {target.parent}")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"{path}: cannot be written: no permission in {target.parent}")


def write_atomically(path: str | Path, text: str) -> None:
    """Give `path` the text in one step, or leave what was there untouched."""
    content = text.encode("utf-8")
    try:
        target = _target(path)
        if _is_stream(target):
            target.write_bytes(content)
        else:
            _replace(target, content)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _target(path: str | Path) -> Path:
    """The file that `path` means, behind links."""
    step, links = os.path.abspath(path), 0
    while os.path.islink(step):
        folder, links = os.path.realpath(os.path.dirname(step)), links + 1
        if links > _MAX_LINKS:
            raise InputError(f"{path}: cannot be written: a loop of links")
        if _OPEN_FILES.fullmatch(folder):
            # An open file of this program: a new file in its place would be lost with its old name.
            if os.path.isfile(step):
                raise InputError(f"{path}: cannot be written: it is redirected to a file; name that file")
            return Path(step)
        step = os.path.join(folder, os.readlink(step))
    return Path(step)


def _is_stream(target: Path) -> bool:
    """Whether it is a device, pipe or socket."""
    return target.exists() and not target.is_file() and not target.is_dir()


def _replace(target: Path, content: bytes) -> None:
    # A short prefix: the name beside it may be as long as names can be.
    handle, name = tempfile.mkstemp(prefix=".memo-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        os.chmod(name, mode)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    # The mask can only be read by setting it; temporary files are private by default.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
