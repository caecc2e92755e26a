"""The one place that loads the compiled search (`_search.so`, from csrc/solver).

The library is optional: without it every answer is still found, by the slower
Python searches and CP-SAT, and `native_status()` says why it is missing.
ctypes releases the interpreter lock during a call, so searches run beside each
other in threads; each polls a shared `StopFlag` and its own deadline.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memo_solver.outcome import Outcome, SearchResult, StopFlag
from memo_solver.sections import Section

INTERFACE_VERSION = 1
_LIBRARY = Path(__file__).with_name("_search.so")


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeStatus:
    """Whether the compiled search is in use, and if not, why."""

    available: bool
    reason: str


class _Library:
    """The loaded library, or the reason why there is none."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.reason = "compiled search in use"
        if not _LIBRARY.exists():
            self.reason = "not built: install with a C++17 compiler present (MEMO_BUILD_EXT=on)"
            return
        try:
            handle = ctypes.CDLL(str(_LIBRARY))
            found = int(handle.memo_interface_version())
        except (OSError, AttributeError) as error:
            self.reason = f"cannot be loaded: {error}"
            return
        if found != INTERFACE_VERSION:
            self.reason = f"has interface {found}, this version needs {INTERFACE_VERSION}: build it again"
            return
        self.handle = handle


@functools.cache
def _library() -> _Library:
    return _Library()


def native_status() -> NativeStatus:
    """Say whether the compiled search is in use."""
    library = _library()
    return NativeStatus(available=library.handle is not None, reason=library.reason)


def usable_for(section: Section) -> bool:
    """Whether the compiled search is there and safe for these numbers."""
    return native_status().available and section.fits_native


class NativeSection:
    """A section as C arrays, made once and shared by all calls."""

    def __init__(self, section: Section) -> None:
        n = section.num_requests
        int32s, int64s = ctypes.c_int32 * n, ctypes.c_int64 * n
        self.section = section
        self._arguments = (
            ctypes.c_int32(n),
            ctypes.c_int32(section.num_slots),
            int32s(*section.first),
            int32s(*section.last),
            int64s(*section.size),
            int64s(*section.alignment),
        )

    def squeaky_wheel(
        self,
        order: Sequence[int],
        *,
        num_fixed: int,
        target: int,
        max_passes: int,
        seed: int,
        stop: StopFlag,
        seconds: float,
    ) -> SearchResult:
        """First fit with repair of the order; see csrc/solver/squeaky_wheel.hpp."""
        n = self.section.num_requests
        offsets = (ctypes.c_int64 * n)()
        peak, num_passes = ctypes.c_int64(-1), ctypes.c_int32(0)
        code = _library().handle.memo_squeaky_wheel(
            *self._arguments,
            (ctypes.c_int32 * n)(*order),
            ctypes.c_int32(num_fixed),
            ctypes.c_int64(target),
            ctypes.c_int32(max_passes),
            ctypes.c_uint64(seed),
            stop.address,
            ctypes.c_double(seconds),
            offsets,
            ctypes.byref(peak),
            ctypes.byref(num_passes),
        )
        return _result(code, offsets, num_passes.value)

    def canonical_search(
        self,
        order: Sequence[int],
        *,
        capacity: int,
        max_nodes: int,
        stop: StopFlag,
        seconds: float,
    ) -> SearchResult:
        """Exact search bottom-up; see csrc/solver/canonical_search.hpp."""
        n = self.section.num_requests
        offsets, num_nodes = (ctypes.c_int64 * n)(), ctypes.c_int64(0)
        code = _library().handle.memo_canonical_search(
            *self._arguments,
            (ctypes.c_int32 * n)(*order),
            ctypes.c_int64(capacity),
            ctypes.c_int64(max_nodes),
            stop.address,
            ctypes.c_double(seconds),
            offsets,
            ctypes.byref(num_nodes),
        )
        return _result(code, offsets, num_nodes.value)

    def valley_search(
        self, *, capacity: int, seed: int, max_nodes: int, stop: StopFlag, seconds: float
    ) -> SearchResult:
        """Exact search for tight packings; see csrc/solver/valley_search.hpp."""
        n = self.section.num_requests
        offsets, num_nodes = (ctypes.c_int64 * n)(), ctypes.c_int64(0)
        code = _library().handle.memo_valley_search(
            *self._arguments,
            ctypes.c_int64(capacity),
            ctypes.c_uint64(seed),
            ctypes.c_int64(max_nodes),
            stop.address,
            ctypes.c_double(seconds),
            offsets,
            ctypes.byref(num_nodes),
        )
        return _result(code, offsets, num_nodes.value)


def _result(code: int, offsets: Any, effort: int) -> SearchResult:  # noqa: ANN401 - a ctypes array
    if code == -1:
        raise MemoryError("the compiled search ran out of memory")
    outcome = Outcome(code)
    found = tuple(offsets) if outcome is Outcome.FOUND else None
    return SearchResult(outcome=outcome, offsets=found, effort=effort)
