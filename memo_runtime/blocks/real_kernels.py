"""Where real kernels are wanted though others stand in for them (``memo.rehearse``).

A rehearsal replaces the kernels of attention for the whole process. What is timed, captured or compared meanwhile must
see the real ones, or a profile would hold times of stand-ins, and a check would compare them with each other.
"""

from __future__ import annotations

from typing import Self


class _Open:
    #: Of the process: what is measured may go backward on autograd's own threads.
    count = 0


class RealKernels:
    """Inside, stand-ins pass every call to the kernels that they replace; without stand-ins it does nothing."""

    __slots__ = ()

    def __enter__(self) -> Self:
        _Open.count += 1
        return self

    def __exit__(self, *_: object) -> None:
        _Open.count = max(0, _Open.count - 1)


def real_kernels_wanted() -> bool:
    """What runs now is measured or compared."""
    return _Open.count > 0


def forget_interrupted() -> None:
    """Nothing is measured now: what an interrupt has left open is closed."""
    _Open.count = 0
