"""What one search reports to its driver, and how it is told to stop."""

from __future__ import annotations

import ctypes
import enum
from dataclasses import dataclass
from typing import Any


class Outcome(enum.Enum):
    """How a search for a placement ended; the numbers are those of the C interface."""

    INFEASIBLE = 0
    """Searched to the end: there is none."""
    FOUND = 1
    LIMIT = 2
    """The effort allowed was spent."""
    STOPPED = 3
    """The deadline passed or the flag was set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """Outcome, offsets in units when found, and effort (nodes, passes or branches)."""

    outcome: Outcome
    offsets: tuple[int, ...] | None = None
    effort: int = 0


class StopFlag:
    """A flag that threads, Python and compiled searches can see alike."""

    def __init__(self) -> None:
        self._value = ctypes.c_int32(0)

    @property
    def address(self) -> Any:  # noqa: ANN401 - a ctypes pointer
        """Pointer for the compiled searches."""
        return ctypes.byref(self._value)

    def set(self) -> None:
        """Ask every search that polls this flag to stop."""
        self._value.value = 1

    def is_set(self) -> bool:
        """Whether stopping was asked for."""
        return self._value.value != 0
