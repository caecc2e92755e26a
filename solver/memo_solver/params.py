"""What a caller may set about a solve, and what a solve tells while it runs."""

from __future__ import annotations

import enum
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from memo_solver.errors import InputError


class Switch(enum.Enum):
    """Whether to use an optional part."""

    AUTO = "auto"
    """Use it when it is there."""
    ON = "on"
    """Use it, and fail when it is not there."""
    OFF = "off"


@functools.cache
def _warn_once(asked: int, cores: int) -> None:
    logging.getLogger("memo_solver").warning("%d threads asked for, %d used: one for each core", asked, cores)


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveParams:
    """Limits and switches of one solve; the defaults suit an interactive user."""

    time_limit_seconds: float = 30.0
    """Hard limit of wall time; the best placement so far is returned when it passes."""
    seed: int = 0
    """Same seed, same problem, no limit hit: same placement."""
    num_threads: int | None = None
    """Searches that run beside each other; None = the cores this process may use, which is also the most."""
    native: Switch = Switch.AUTO
    """The compiled search."""
    cpsat: Switch = Switch.AUTO
    """OR-Tools CP-SAT in the race."""
    exact: Switch = Switch.AUTO
    """Exact search and longer repair after the heuristics; OFF = quick heuristics only."""

    def __post_init__(self) -> None:
        """Refuse limits that mean nothing."""
        if type(self.time_limit_seconds) not in (int, float) or not self.time_limit_seconds > 0:
            raise InputError(f"time_limit_seconds must be a number above 0, got {self.time_limit_seconds!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be an integer from 0 to 2^63 - 1, got {self.seed!r}")
        if self.num_threads is not None and (type(self.num_threads) is not int or self.num_threads < 1):
            raise InputError(f"num_threads must be an integer of at least 1, got {self.num_threads!r}")
        for name in ("native", "cpsat", "exact"):
            if not isinstance(getattr(self, name), Switch):
                raise InputError(f"{name} must be Switch.AUTO, ON or OFF, got {getattr(self, name)!r}")

    @property
    def threads(self) -> int:
        """Number of threads to use: more than there are cores would only overrun the limit."""
        cores = len(os.sched_getaffinity(0))
        if self.num_threads is None:
            return cores
        if self.num_threads > cores:
            _warn_once(self.num_threads, cores)
        return min(self.num_threads, cores)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """State of a running solve: incumbent and bound in bytes, elapsed seconds."""

    stage: str
    peak: int | None
    lower_bound: int
    seconds: float


ProgressListener = Callable[[Progress], None]
