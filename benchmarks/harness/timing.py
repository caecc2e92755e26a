"""How many steps are measured, and what is said of them. Needs no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

#: (longest length, steady steps, steps before them): long steps vary less and cost more.
_STEPS = ((65_536, 5, 2), (131_072, 3, 1))
_BEYOND = (1, 1)
#: Beyond this length a step takes long: what comes before it is a rehearsal, which does all but attention.
_REHEARSED_BEYOND = 131_072


def step_counts(tokens: int, cap: int | None = None) -> tuple[int, int]:
    """(steady steps, warm-up steps) at ``tokens``; ``cap`` bounds both."""
    steady, warm = next(((steady, warm) for limit, steady, warm in _STEPS if tokens <= limit), _BEYOND)
    return (steady, warm) if cap is None else (min(steady, cap), min(warm, cap))


def warms_up_by_rehearsal(tokens: int) -> bool:
    """Whether the steps before those that are measured are rehearsed at ``tokens``."""
    return tokens > _REHEARSED_BEYOND


def percentiles(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, p20, p80 and count of steady steps, interpolated between what was measured and never beyond it."""
    ordered = sorted(seconds)
    low, high = ordered[0], ordered[-1]
    if len(ordered) > 1:
        fifths = statistics.quantiles(ordered, n=5, method="inclusive")
        low, high = fifths[0], fifths[-1]
    return {"step_seconds": statistics.median(ordered), "p20": low, "p80": high, "n": len(ordered)}


def predicted_seconds(before: int, step_seconds: float, other_seconds: float, tokens: int, cap: int | None) -> float:
    """Seconds that ``tokens`` will take, from a shorter length ``before``.

    Args:
        step_seconds: of one step there, taken to grow with the square. other_seconds: of everything beside the
            steps (profiling, pinning), taken to grow with the length.
    """
    ratio = tokens / before
    steady, warm = step_counts(tokens, cap)
    steps = steady if warms_up_by_rehearsal(tokens) else steady + warm
    return step_seconds * ratio**2 * steps + other_seconds * ratio
