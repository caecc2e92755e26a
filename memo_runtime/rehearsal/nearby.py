"""The longest length that fits, by rehearsals near a forecast. Needs no torch.

A rehearsal takes a whole step, and a plan takes seconds. Where plans can be asked for, the longest that has one is
searched first, and a step is taken there: mostly one is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from memo_runtime.rehearsal.record import Rehearsal

#: The search ends where what fits and what does not are this close together, relative to the forecast.
PRECISION = 0.01
#: First step away from the forecast; every next one is twice as long.
_STEP = 0.02


class OutOfTimeError(Exception):
    """There is no time for what was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearby:
    """What rehearsals near a forecast have shown.

    Attributes:
        tokens: the longest that fits, 0 if none does. longest: its rehearsal. short_at: the shortest that does not fit,
            0 if all that were asked fit. short: its rehearsal. rehearsed: how many lengths were tried.
        planned: how many were asked for their plan alone, and planned_at: the longest that has one; 0: none.
        cut: time was over before the search was.
    """

    tokens: int = 0
    longest: Rehearsal | None = None
    short_at: int = 0
    short: Rehearsal | None = None
    rehearsed: int = 0
    planned: int = 0
    planned_at: int = 0
    cut: bool = False


def longest_near(
    forecast: int,
    unit: int,
    rehearse: Callable[[int], Rehearsal],
    *,
    plan: Callable[[int], Rehearsal | None] | None = None,
    most: int | None = None,
) -> Nearby:
    """The longest multiple of ``unit`` that fits, searched from ``forecast`` on, never beyond ``most``.

    Args:
        rehearse: a step of so many tokens. plan: how one of so many ends for want of a plan; None: it has one. Both may
            raise ``OutOfTimeError``, and what is known by then is the result.
    """
    search = _Search(forecast, unit, rehearse, plan, most)
    try:
        search.run()
    except OutOfTimeError:
        return search.found(cut=True)
    return search.found()


@dataclass(slots=True)
class _Search:
    forecast: int
    unit: int
    rehearse: Callable[[int], Rehearsal]
    plan: Callable[[int], Rehearsal | None] | None
    most: int | None
    tried: dict[int, Rehearsal] = field(default_factory=dict)
    #: By their plans alone.
    planned: dict[int, Rehearsal | None] = field(default_factory=dict)

    def run(self) -> None:
        if self.plan is None:
            self._bracket(self.forecast, self._fits)
            return
        longest = self._bracket(self.forecast, self._has_plan)
        if longest and not self._fits(longest):
            self._bracket(longest, self._fits)

    def found(self, *, cut: bool = False) -> Nearby:
        """What is known."""
        with_plan = [tokens for tokens, refusal in self.planned.items() if refusal is None]
        low = max((tokens for tokens, one in self.tried.items() if one.fits), default=0)
        short = {tokens: one for tokens, one in self.planned.items() if one is not None}
        short |= {tokens: one for tokens, one in self.tried.items() if not one.fits}
        high = min((tokens for tokens in short if tokens > low), default=0)
        return Nearby(
            tokens=low, longest=self.tried.get(low), short_at=high, short=short.get(high), rehearsed=len(self.tried),
            planned=len(self.planned), planned_at=max(with_plan, default=0), cut=cut,
        )  # fmt: skip

    def _fits(self, tokens: int) -> bool:
        if tokens not in self.tried:
            self.tried[tokens] = self.rehearse(tokens)
        return self.tried[tokens].fits

    def _has_plan(self, tokens: int) -> bool:
        assert self.plan is not None, "plans are asked for where there are some"
        if tokens not in self.planned:
            self.planned[tokens] = self.plan(tokens)
        return self.planned[tokens] is None

    def _rounded(self, tokens: float) -> int:
        unit, most = self.unit, self.most
        whole = max(unit, round(tokens / unit) * unit)
        return whole if most is None else min(whole, most // unit * unit)

    def _bracket(self, start: int, fits: Callable[[int], bool]) -> int:
        """The longest that ``fits``, searched from ``start`` on; 0: none does."""
        unit = self.unit
        low = high = self._rounded(start)
        step = max(unit, self._rounded(_STEP * self.forecast))
        if fits(low):
            while (high := self._rounded(low + step)) > low and fits(high):
                low, step = high, 2 * step
        else:
            low = self._rounded(high - step) if high > unit else 0
            while low and not fits(low):
                high, step = low, 2 * step
                low = self._rounded(high - step) if high > unit else 0
        while high - low > max(unit, PRECISION * self.forecast):
            middle = (low + high) // 2 // unit * unit
            if not low < middle < high:
                break
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low
