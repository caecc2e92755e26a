"""What is known about one section while a solve goes on: bound, incumbent, proof."""

from __future__ import annotations

import math

from memo_solver import native
from memo_solver.bounds import ALIVE_TOGETHER, ReachableHeights, contention, load_bound, rounded_up
from memo_solver.orders import heuristic_names, heuristic_order
from memo_solver.records import Problem, Proof
from memo_solver.sections import Section


class SectionState:
    """Bound and incumbent of a section; heights in units inside, bytes outside."""

    def __init__(self, section: Section, *, use_native: bool, fixed: tuple[int, ...] = ()) -> None:
        self.section = section
        self.fixed = fixed
        """Requests that every order places first, in this order (see cyclic.py)."""
        self.ranking = heuristic_names()
        """Orders for first fit, the best for this section first, as far as they were tried."""
        self._orders: dict[str, list[int]] = {}
        self._contention: list[int] | None = None
        self.compiled = native.NativeSection(section) if use_native else None
        load = load_bound(section)
        self._load = load
        self.bound = load.bound
        self.offsets: tuple[int, ...] | None = None
        self.peak_units: int | None = None
        self.step: int | None = None
        """How far below the incumbent the next height to ask for is (units); None = nothing was asked so far."""
        self._heights: ReachableHeights | None = None

    @property
    def lower_bound(self) -> int:
        """Lower bound of the peak, in bytes."""
        return self.bound * self.section.unit

    @property
    def peak(self) -> int | None:
        """Peak of the incumbent in bytes, or None without one."""
        return None if self.peak_units is None else self.peak_units * self.section.unit

    def order(self, name: str) -> list[int]:
        """Order of placement by name, made once; the fixed requests come first.

        "incumbent" is the order of the offsets of the best placement so far: first
        fit in that order never ends higher (each request finds its old place free).
        """
        if name == "incumbent":
            assert self.offsets is not None
            offsets, rank = self.offsets, {i: k for k, i in enumerate(self.fixed)}
            last = len(rank)
            return sorted(range(len(offsets)), key=lambda i: (rank.get(i, last), offsets[i], i))
        if name not in self._orders:
            if self._contention is None:
                self._contention = contention(self.section)
            order = heuristic_order(self.section, name, self._contention)
            fixed = set(self.fixed)
            self._orders[name] = [*self.fixed, *(i for i in order if i not in fixed)]
        return self._orders[name]

    def offer(self, offsets: tuple[int, ...]) -> bool:
        """Keep a placement (in units) when it is lower than the incumbent."""
        peak = max(o + s for o, s in zip(offsets, self.section.size, strict=True))
        if self.peak_units is not None and peak >= self.peak_units:
            return False
        self.offsets, self.peak_units = offsets, peak
        return True

    def floor_height(self, height: int) -> int:
        """Largest height (units) a peak can have that is not above `height`."""
        return self._reachable().at_most(height)

    def exclude(self, height: int) -> None:
        """Note the proof that nothing fits in `height` (units): the bound rises above it."""
        self.bound = max(self.bound, self._reachable().above(height))

    def _reachable(self) -> ReachableHeights:
        if self._heights is None:
            limit = self.peak_units if self.peak_units is not None else 2 * self.bound
            self._heights = ReachableHeights(self.section, limit)
        return self._heights

    def proof(self, problem: Problem) -> Proof:
        """Why the bound holds: a live set that adds up to it, or an exhaustive search."""
        if self.bound > self._load.bound:
            reason = f"exhaustive search over {self.section.num_requests} requests"
            return Proof(bound=self.lower_bound, reason=reason)
        alive = self.section.members(self._load.slot)
        multiple = math.gcd(*self.section.alignment)
        rounded = any(self.section.size[i] % multiple for i in alive)
        members = [self.section.index[i] for i in alive]
        return Proof(
            bound=self.lower_bound,
            reason=rounded_up(multiple * self.section.unit) if rounded else ALIVE_TOGETHER,
            time=max(problem.requests[i].lower for i in members),
            request_ids=tuple(problem.requests[i].id for i in members),
        )
