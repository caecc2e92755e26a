"""Steps that repeat: lifetimes may wrap round the step boundary.

A request of a step of `period` time units may end after `period`: it then lives
on into the next step, [lower, period) and [0, upper - period) of every step, at
one address. All such requests are alive together at time 0, so they are stacked
from the floor in one order, which every heuristic keeps in front: both pieces
of each then get the same address by themselves (and it is checked).

    address |B piece 2|                 |B piece 1|
            |A piece 2 |        |     A piece 1   |     period = right edge
            +----------+--------+-----------------+
"""

from __future__ import annotations

from dataclasses import dataclass

from memo_solver.engine import solve
from memo_solver.errors import InputError
from memo_solver.params import ProgressListener, SolveParams
from memo_solver.records import Placement, Problem, Request, Solution


@dataclass(frozen=True, slots=True, kw_only=True)
class Unrolled:
    """A cyclic problem cut at the step boundary."""

    problem: Problem
    """Pieces: requests that do not wrap, as they were, then both pieces of those that do."""
    heads: dict[str, str]
    """Piece at the start of the step (id) of each wrapping request (id)."""
    tails: dict[str, str]
    """Piece at the end of the step."""

    @property
    def fixed(self) -> tuple[str, ...]:
        """Ids of the pieces in stacking order."""
        return tuple(piece for name in self.heads for piece in (self.heads[name], self.tails[name]))

    @property
    def owners(self) -> dict[str, str]:
        """Request (id) of each piece (id)."""
        return {piece: name for pieces in (self.heads, self.tails) for name, piece in pieces.items()}

    def offsets(self, placement: Placement, requests: tuple[Request, ...]) -> tuple[int, ...]:
        """Offset of each original request; both pieces must agree."""
        by_id = placement.by_id()
        for name, head in self.heads.items():
            if by_id[head] != by_id[self.tails[name]]:
                raise AssertionError(f"the pieces of '{name}' were placed at two addresses")
        return tuple(by_id[self.heads.get(r.id, r.id)] for r in requests)


def unused_name(name: str, taken: set[str]) -> str:
    """The name, with as many marks behind it as make it one that nobody has; it is taken from then on."""
    while name in taken:
        name += "'"
    taken.add(name)
    return name


def unroll(requests: tuple[Request, ...], period: int | None) -> Unrolled:
    """Cut the requests that end after `period` into two pieces; None = nothing wraps."""
    if period is None:
        return Unrolled(problem=Problem(requests=requests), heads={}, tails={})
    if period < 1:
        raise InputError(f"period must be at least 1, got {period}")
    plain: list[Request] = []
    wrapping: list[Request] = []
    for r in requests:
        if not 0 <= r.lower < period or r.upper > r.lower + period:
            raise InputError(
                f"request '{r.id}': [{r.lower}, {r.upper}) must begin in [0, {period}) and last "
                f"at most one period of {period}"
            )
        (plain if r.upper <= period or r.is_empty else wrapping).append(r)
    # Tall requests at the bottom, then those that leave the most room above them soonest.
    wrapping.sort(key=lambda r: (-(r.upper - r.lower), -r.size, r.id))
    heads: dict[str, str] = {}
    tails: dict[str, str] = {}
    pieces = list(plain)
    taken = {r.id for r in requests}
    for r in wrapping:
        heads[r.id], tails[r.id] = unused_name(f"{r.id}@start", taken), unused_name(f"{r.id}@end", taken)
        pieces.append(Request(heads[r.id], 0, r.upper - period, r.size, r.alignment))
        pieces.append(Request(tails[r.id], r.lower, period, r.size, r.alignment))
    return Unrolled(problem=Problem(requests=tuple(pieces)), heads=heads, tails=tails)


def solve_unrolled(
    unrolled: Unrolled,
    params: SolveParams,
    *,
    progress: ProgressListener | None = None,
    hint: Placement | None = None,
) -> Solution:
    """Solve the pieces; a `hint` is a placement of the pieces."""
    return solve(unrolled.problem, params, progress=progress, hint=hint, fixed=unrolled.fixed)
