"""The longest length that fits, by rehearsals near a forecast. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memo_runtime.rehearsal.record import Rehearsal

#: The search ends where what fits and what does not are this close together, relative to the forecast.
PRECISION = 0.01
#: First step away from the forecast; every next one is twice as long.
_STEP = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearby:
    """What rehearsals near a forecast have shown.

    Attributes:
        tokens: the longest that fits, 0 if none does. longest: its rehearsal. short_at: the shortest that does not fit,
            0 if all that were asked fit. short: its rehearsal. rehearsed: how many lengths were tried.
    """

    tokens: int = 0
    longest: Rehearsal | None = None
    short_at: int = 0
    short: Rehearsal | None = None
    rehearsed: int = 0


def longest_near(forecast: int, unit: int, rehearse: Callable[[int], Rehearsal], *, most: int | None = None) -> Nearby:
    """The longest multiple of ``unit`` that fits, searched from ``forecast`` on, never beyond ``most``."""
    tried: dict[int, Rehearsal] = {}

    def fits(tokens: int) -> bool:
        tried[tokens] = rehearse(tokens)
        return tried[tokens].fits

    def rounded(tokens: float) -> int:
        whole = max(unit, round(tokens / unit) * unit)
        return whole if most is None else min(whole, most // unit * unit)

    low = high = rounded(forecast)
    step = max(unit, rounded(_STEP * forecast))
    if fits(low):
        while (high := rounded(low + step)) > low and fits(high):
            low, step = high, 2 * step
    else:
        low = rounded(high - step) if high > unit else 0
        while low and not fits(low):
            high, step = low, 2 * step
            low = rounded(high - step) if high > unit else 0
    while high - low > max(unit, PRECISION * forecast):
        middle = (low + high) // 2 // unit * unit
        if not low < middle < high:
            break
        low, high = (middle, high) if fits(middle) else (low, middle)
    short = tried.get(high) if high > low else None
    return Nearby(
        tokens=low, longest=tried.get(low), short_at=high if short is not None else 0, short=short, rehearsed=len(tried)
    )
