"""Exit codes, and how errors become one."""

from __future__ import annotations

from enum import IntEnum

from memo_runtime.errors import (
    MemoError,
    PlanInfeasibleError,
    PlanMismatchError,
    ReplayMismatchError,
)


class ExitCode(IntEnum):
    """What ``memo`` tells its caller."""

    OK = 0
    BUG = 1  # ours, or a check that failed
    USAGE = 2  # the command line, a file or a model cannot be used as given
    INFEASIBLE = 3  # proved: nothing fits
    NOT_FOUND = 4  # nothing found in the time
    MISMATCH = 5  # the plan was made for something else


_BY_ERROR: tuple[tuple[type[MemoError], ExitCode], ...] = (
    (PlanInfeasibleError, ExitCode.INFEASIBLE),
    (PlanMismatchError, ExitCode.MISMATCH),
    (ReplayMismatchError, ExitCode.BUG),
)


def exit_code(error: MemoError) -> ExitCode:
    """The exit code of ``error``; what is not listed is something the user gave and can change."""
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), ExitCode.USAGE)
