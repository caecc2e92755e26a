"""Bisection over whole numbers."""

from __future__ import annotations

from collections.abc import Callable


def largest(fits: Callable[[int], bool], below: int) -> int:
    """A number in [0, below) that fits while the next does not, taking 0 to fit and ``below`` not to.

    Where fitting is monotone that is the largest that fits.
    """
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
