"""What users ask for: files, written as a whole, or what was there stays; and what goes to stdout.

Links are followed, and the file behind them is replaced in one move: a reader sees the old file or the new one, never a
part of it. Devices and pipes cannot be replaced; they are written to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from pathlib import Path

from memo_runtime.errors import ArgumentTypeError, OutputError
from memo_runtime.units import show_value

_MAX_LINKS = 40
#: Names of this program's open files, behind /dev/stdout and /dev/fd.
_OPEN_FILES = re.compile(r"/proc/[^/]+(/task/[^/]+)?/fd")
_WOULD_WORK = "give a file in a folder that exists and is writable"


def file_path(path: object) -> Path:
    """``path`` as a ``Path``.

    Raises:
        ArgumentTypeError: it names no file.
    """
    if isinstance(path, (str, os.PathLike)) and isinstance(os.fspath(path), str):
        return Path(path)
    raise ArgumentTypeError(
        f"path={show_value(path)} ({type(path).__name__}) is no name of a file: give a str or a pathlib.Path"
    )


def write_output(path: str | os.PathLike[str], content: bytes) -> None:
    """Give ``path`` this content in one move.

    Raises:
        ArgumentTypeError: ``path`` names no file.
        OutputError: the file cannot be written; what was there is untouched.
    """
    given = file_path(path)
    try:
        target = _behind_links(given)
        if _is_stream(target):
            target.write_bytes(content)
            return
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            part.write_bytes(content)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {given}: {error.strerror or error}; {_WOULD_WORK}") from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Look whether ``write_output`` could write to ``path``, before anything long is done for it.

    Raises:
        ArgumentTypeError: ``path`` names no file.
        OutputError: its folder does not exist or cannot be written to, or it is a folder itself.
    """
    given = file_path(path)
    try:
        target = _behind_links(given)
    except OSError as error:
        raise OutputError(f"cannot write {given}: {error.strerror}; {_WOULD_WORK}") from error
    folder = target.parent
    why = None
    if target.is_dir():
        why = "it is a folder"
    elif _is_stream(target):
        why = None if os.access(target, os.W_OK) else "it is not writable"
    elif not folder.is_dir():
        why = f"there is no folder {folder}"
    elif not os.access(folder, os.W_OK):
        why = f"{folder} is not writable"
    if why:
        raise OutputError(f"cannot write {given}: {why}; {_WOULD_WORK}")


def _behind_links(path: Path) -> Path:
    """The file that ``path`` means."""
    step = os.fspath(path)
    for _ in range(_MAX_LINKS):
        if not os.path.islink(step):
            return Path(step)
        folder = os.path.realpath(os.path.dirname(step))
        if _OPEN_FILES.fullmatch(folder):
            # A new file in its place would not be the one that is open.
            if os.path.isfile(step):
                raise OSError(errno.EINVAL, "it is redirected to a file: name that file")
            return Path(step)
        step = os.path.join(folder, os.readlink(step))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _is_stream(target: Path) -> bool:
    """Whether it is a device, a pipe or a socket."""
    return target.exists() and not target.is_file() and not target.is_dir()


def print_all(text: str) -> str:
    """Print ``text`` now, not when Python ends; why it cannot be printed.

    "": it was printed, there is no stdout, or the reader has gone (``| head``), which is no failure.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.write(text)
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_rest()
    except OSError as error:
        _drop_rest()
        return f"the answer cannot be printed: {error.strerror or error}"
    return ""


def _drop_rest() -> None:
    """What is left in the buffer has nowhere to go; Python would try again at its end, complain and exit with 120."""
    with contextlib.suppress(OSError, ValueError):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)
