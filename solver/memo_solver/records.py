"""The nouns: what is asked (Request, Problem) and what is answered (Placement, Solution).

A request wants `size` bytes from time `lower` until just before time `upper`
(lifetimes are half-open: a request that ends at 5 and one that starts at 5 may
share an address). A placement gives each request an offset:

    address
      6 |      +-----------+        B: lower 2, upper 6, size 3, offset 3
        |      |     B     |
      3 | +----+---+-------+---+
        | |   A    |     C     |    A: lower 0, upper 4, size 3, offset 0
      0 +-+--------+-----------+--> C: lower 4, upper 8, size 3, offset 0
          0    2   4       6   8  time

The peak of a placement is the highest end address; no placement can be lower
than the largest sum of sizes alive at one time (the peak load).
Sizes, offsets, alignments and capacities share one unit (bytes, by custom);
times are any integers that order the events.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from memo_solver.errors import InputError

MAX_VALUE = 2**63 - 1
"""Largest size, time, alignment or capacity that is accepted (signed 64 bits)."""


def is_text(identity: str) -> bool:
    """Whether an id can be written to a file: JSON can smuggle in lone surrogates."""
    return identity.isascii() or not any("\ud800" <= character <= "\udfff" for character in identity)


class Status(enum.Enum):
    """What is known about a question when the search ends."""

    OPTIMAL = "optimal"
    """A placement is given and none is lower (or: it fits, when that was asked)."""
    FEASIBLE = "feasible"
    """A placement is given; a lower one may exist (see the gap)."""
    INFEASIBLE = "infeasible"
    """Proved: no placement fits in the capacity."""
    UNKNOWN = "unknown"
    """Neither found nor excluded in the time given."""


@dataclass(frozen=True, slots=True)
class Request:
    """One wish for memory, with a half-open lifetime [lower, upper)."""

    id: str
    lower: int
    upper: int
    size: int
    alignment: int = 1

    def __post_init__(self) -> None:
        """Refuse values that no placement could honour, naming the field."""
        if type(self.id) is not str or not self.id:
            raise InputError(f"id must be a non-empty text, got {self.id!r}")
        if not is_text(self.id):
            raise InputError(f"id {ascii(self.id)[:60]} holds half a character (a lone surrogate)")
        for name in ("lower", "upper", "size", "alignment"):
            value = getattr(self, name)
            if type(value) is not int:
                raise InputError(f"request '{self.id}': {name} must be an integer, got {value!r}")
            if not -MAX_VALUE <= value <= MAX_VALUE:
                raise InputError(f"request '{self.id}': {name} {value} does not fit in 64 bits")
        if self.upper < self.lower:
            raise InputError(
                f"request '{self.id}': upper {self.upper} is below lower {self.lower}; "
                "a lifetime is [lower, upper)"
            )
        if self.size < 0:
            raise InputError(f"request '{self.id}': size {self.size} is negative")
        if self.alignment < 1:
            raise InputError(f"request '{self.id}': alignment {self.alignment} is below 1")

    @property
    def is_empty(self) -> bool:
        """Whether it occupies nothing (no bytes or no time) and meets nobody."""
        return self.size == 0 or self.lower == self.upper


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Requests to place; `capacity` (same unit as sizes) asks 'does it fit?'."""

    requests: tuple[Request, ...]
    capacity: int | None = None

    def __post_init__(self) -> None:
        """Refuse duplicate ids and a capacity that cannot hold the largest request."""
        seen = {request.id for request in self.requests}
        if len(seen) < len(self.requests):
            for request in self.requests:
                if request.id not in seen:
                    raise InputError(f"id '{request.id}' is used by more than one request")
                seen.remove(request.id)
        if self.capacity is None:
            return
        if type(self.capacity) is not int or not 0 <= self.capacity <= MAX_VALUE:
            raise InputError(
                f"capacity must be an integer from 0 to 2^63 - 1, got {self.capacity!r}"
            )
        largest = max(self.requests, key=lambda r: r.size, default=None)
        if largest is not None and largest.size > self.capacity:
            raise InputError(
                f"capacity {self.capacity} is below the size {largest.size} of the largest "
                f"request '{largest.id}'; a capacity of at least {largest.size} is needed"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One offset per request of `problem`, in the same order."""

    problem: Problem
    offsets: tuple[int, ...]
    peak: int = field(init=False, compare=False, repr=False)
    """Highest end address (0 when nothing is placed)."""

    def __post_init__(self) -> None:
        """Work out the peak once: it is asked for often."""
        pairs = zip(self.problem.requests, self.offsets, strict=True)
        ends = [offset + r.size for r, offset in pairs if r.size > 0 and r.lower < r.upper]
        object.__setattr__(self, "peak", max(ends, default=0))

    def by_id(self) -> dict[str, int]:
        """Offset of each request, keyed by its id."""
        pairs = zip(self.problem.requests, self.offsets, strict=True)
        return {request.id: offset for request, offset in pairs}


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Why nothing lower than `bound` exists.

    When `request_ids` is not empty these requests are all alive at `time` and
    need `bound` bytes there, which anybody can add up. Otherwise the bound was
    proved by exhaustive search, named in `reason`.
    """

    bound: int
    reason: str
    time: int | None = None
    request_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Wall time of one stage of a solve and what it left behind."""

    name: str
    seconds: float
    peak: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Answer of a solve: status, best placement, bound, and time per stage.

    `lower_bound` holds for every placement of the problem, whatever the status.
    """

    status: Status
    placement: Placement | None
    lower_bound: int
    proof: Proof | None = None
    stages: tuple[Stage, ...] = ()
    interrupted: bool = False

    @property
    def peak(self) -> int | None:
        """Peak of the placement, or None without one."""
        return None if self.placement is None else self.placement.peak

    @property
    def gap(self) -> float | None:
        """Peak over lower bound minus 1 (0.0 = proved optimal), or None without a placement."""
        peak = self.peak
        if peak is None:
            return None
        return 0.0 if peak <= self.lower_bound else peak / self.lower_bound - 1.0

    @property
    def seconds(self) -> float:
        """Wall time of all stages together."""
        return sum(stage.seconds for stage in self.stages)
