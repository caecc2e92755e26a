"""How a size grows with tokens, of its values at three lengths: sizes are polynomials themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from memo_runtime.records import Growth

_MOST_PARTS = 64


def polynomial(size: Callable[[int], float], tokens: int) -> Growth:
    """The polynomial through ``size`` at one, two and three times ``tokens``."""
    return _through(size, tokens, tokens)


def polynomial_within(size: Callable[[int], float], tokens: int, allows: Callable[[int], bool]) -> Growth:
    """The same where a block takes some lengths only, as one whose table of positions ends.

    ``size`` is asked for lengths that ``allows`` allows: shorter ones where longer ones are not. Where ``tokens`` stand
    alone, it is taken to stay as it is there.
    """
    for first, step in _ways(tokens):
        if all(allows(length) for length in (first, first + step, first + 2 * step)):
            return _through(size, first, step)
    return Growth(constant=size(tokens))


def _ways(tokens: int) -> Iterator[tuple[int, int]]:
    """(first length, step to the next two), ``tokens`` among them: multiples, then parts, equal ones first."""
    yield tokens, tokens
    steps = dict.fromkeys([*(tokens // parts for parts in range(3, _MOST_PARTS) if tokens % parts == 0), tokens // 3])
    for step in steps:
        if step and tokens > 2 * step:
            yield tokens - 2 * step, step


def _through(size: Callable[[int], float], first: int, step: int) -> Growth:
    one, two, three = (size(first + count * step) for count in range(3))
    quadratic = (three - 2 * two + one) / (2 * step**2)
    linear = (two - one) / step - (2 * first + step) * quadratic
    return Growth(constant=one - linear * first - quadratic * first**2, linear=linear, quadratic=quadratic)
