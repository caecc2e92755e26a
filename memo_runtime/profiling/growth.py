"""Fitting how a count grows with tokens, exactly where it is a polynomial, and carrying it to other batch sizes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from memo_runtime.records import Growth


def _number(value: Fraction) -> float:
    return int(value) if value.denominator == 1 else float(value)


def fit_counts(points: Sequence[tuple[int, int]]) -> Growth:
    """The polynomial of degree at most 2 through up to three (tokens, count) points.

    FLOPs of matrix products and attention are such polynomials with whole coefficients, so counts at other
    lengths are exact, not estimated.
    """
    unique = sorted(dict(points).items())[-3:]
    if not unique:
        return Growth()
    if len(unique) == 1:
        tokens, count = unique[0]
        return Growth(linear=_number(Fraction(count, tokens)))
    (x0, y0), (x1, y1) = unique[0], unique[1]
    slope = Fraction(y1 - y0, x1 - x0)
    quadratic = Fraction(0)
    if len(unique) == 3:
        x2, y2 = unique[2]
        quadratic = (Fraction(y2 - y1, x2 - x1) - slope) / (x2 - x0)
    linear = slope - quadratic * (x0 + x1)
    constant = y0 - linear * x0 - quadratic * x0 * x0
    return Growth(constant=_number(constant), linear=_number(linear), quadratic=_number(quadratic))


def times(growth: Growth, ratio: Fraction) -> Growth:
    """``growth`` for ``ratio`` times as many sequences; what does not depend on tokens (a launch) stays."""
    return replace(
        growth,
        linear=_scaled(growth.linear, ratio),
        quadratic=_scaled(growth.quadratic, ratio),
    )


def _scaled(value: float, ratio: Fraction) -> float:
    # Whole numbers stay whole: bytes are counted, not estimated.
    return _number(Fraction(value) * ratio)


def line_through(a: Growth, b: Growth, share: Fraction) -> Growth:
    """Coefficient by coefficient ``a`` at 0 and ``b`` at 1, continued to ``share``."""

    def on_line(x: float, y: float) -> float:
        return _number(Fraction(x) + (Fraction(y) - Fraction(x)) * share)

    return replace(
        a,
        constant=on_line(a.constant, b.constant),
        linear=on_line(a.linear, b.linear),
        quadratic=on_line(a.quadratic, b.quadratic),
    )


def fit_seconds(points: Sequence[tuple[int, float]], *, curved: bool) -> Growth:
    """Seconds by tokens through measured points, with no negative coefficient.

    ``curved`` allows a quadratic term (attention); otherwise time is proportional to tokens from the longest
    measurement, and what remains at the shorter one is a constant.
    """
    unique = sorted(dict(points).items())
    if not unique:
        return Growth()
    x1, y1 = unique[-1]
    if len(unique) == 1:
        return Growth(linear=y1 / x1)
    if curved and len(unique) >= 3:
        fitted = _through_three(unique[-3:])
        if fitted is not None:
            return fitted
    x0, y0 = unique[-2] if curved else unique[0]
    if curved:
        quadratic = max(0.0, (y1 / x1 - y0 / x0) / (x1 - x0))
        return Growth(linear=max(0.0, y1 / x1 - quadratic * x1), quadratic=quadratic)
    slope = min(max(0.0, (y1 - y0) / (x1 - x0)), y1 / x1)
    return Growth(constant=max(0.0, y1 - slope * x1), linear=slope)


def _through_three(points: Sequence[tuple[int, float]]) -> Growth | None:
    """Constant (launches), linear (matrix products) and quadratic (attention) seconds; None if one is negative."""
    (x0, y0), (x1, y1), (x2, y2) = points
    slope = (y1 - y0) / (x1 - x0)
    quadratic = ((y2 - y1) / (x2 - x1) - slope) / (x2 - x0)
    linear = slope - quadratic * (x0 + x1)
    constant = y0 - linear * x0 - quadratic * x0 * x0
    if min(quadratic, linear, constant) < 0:
        return None
    return Growth(constant=constant, linear=linear, quadratic=quadratic)


#: Slopes this close are one: allocators round what they hand out.
_SAME_SLOPE = 0.05


def fit_peak(points: Sequence[tuple[int, int]], *, curved: bool) -> Growth:
    """An upper bound of a peak of memory by tokens, from peaks at up to three lengths.

    A peak is the largest of many sums that grow with the tokens. Where one of them is the largest at all lengths, what
    in it does not grow (gradients of weights) is told from what does. Where another takes over in between, or with a
    single length, all is taken to grow in proportion, which is never less. ``curved``: something grows with the square.
    """
    unique = sorted((tokens, max(0, count)) for tokens, count in dict(points).items())[-3:]
    if not unique:
        return Growth()
    (tokens, count) = unique[-1]
    if curved and len(unique) == 3:
        fitted = fit_counts(unique)
        if fitted.quadratic > 0 and fitted.linear >= 0 and fitted.constant >= 0:
            return fitted
    slopes = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in itertools.pairwise(unique)]
    steepest = max(slopes, default=0.0)
    straight = len(slopes) == 2 and abs(slopes[1] - slopes[0]) <= _SAME_SLOPE * steepest
    if curved or not straight or steepest * tokens > count:
        return polynomial_bytes(count, tokens, 2 if curved else 1)
    return Growth(constant=count - steepest * tokens, linear=steepest)


#: A square is believed where it is at least this part of the whole: sizes that depend on data curve a little.
_SQUARE = 0.05


def fit_bytes(points: Sequence[tuple[int, int]]) -> Growth:
    """Bytes by tokens, exact at the longest of up to three lengths; what does not grow is told from what does."""
    unique = sorted(dict(points).items())[-3:]
    tokens, count = unique[-1]
    if len(unique) == 3:
        fitted = fit_counts(unique)
        square = fitted.quadratic * tokens * tokens
        if square >= _SQUARE * count > 0 and fitted.linear >= 0 and fitted.constant >= 0:
            return fitted
    if len(unique) > 1:
        fitted = fit_counts([unique[0], unique[-1]])
        # No length has less than nothing.
        if fitted.linear >= 0 and fitted.linear + fitted.constant >= 0:
            return fitted
    return polynomial_bytes(count, tokens, 1)


def polynomial_bytes(size_bytes: int, tokens: int, dims: int, multiple: int = 1) -> Growth:
    """Bytes of a tensor with ``dims`` token dimensions that takes ``size_bytes`` at ``tokens``."""
    rounded = -(-tokens // multiple) * multiple
    value = _number(Fraction(size_bytes, rounded**dims))
    if dims == 0:
        return Growth(constant=value)
    if dims == 1:
        return Growth(linear=value, multiple=multiple)
    return Growth(quadratic=value, multiple=multiple)
