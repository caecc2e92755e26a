"""Exceptions of memo_solver: what was asked, what there is, what would work.

Every mistake of a caller or of an input file is a `MemoSolverError`; an
`AssertionError` out of this package is a bug of ours.
"""

from __future__ import annotations


class MemoSolverError(Exception):
    """Base of every error this package raises on purpose."""


class InputError(MemoSolverError, ValueError):
    """A request, problem, parameter or file that cannot be used as given."""


class FileFormatError(InputError):
    """An input file with a mistake at a known place: file, line (from 1) and field."""

    def __init__(self, message: str, *, path: str, line: int | None, field: str | None) -> None:
        place = path if line is None else f"{path}, line {line}"
        if field is not None:
            place = f"{place}, field '{field}'"
        super().__init__(f"{place}: {message}")
        self.path = path
        self.line = line
        self.field = field


class InvalidPlacementError(MemoSolverError, ValueError):
    """A placement that breaks a rule; the text names the rule and the requests."""


class MissingSolverError(MemoSolverError, RuntimeError):
    """An optional solver package is needed for what was asked and is not installed."""
