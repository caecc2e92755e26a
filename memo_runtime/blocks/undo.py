"""Putting back what a run changed, whatever interrupts it.

A rerun takes the place of its forward in modules, buffers and generators, and puts everything back in a ``finally``.
An interrupt is raised wherever Python looks for signals: before that ``finally`` is reached, or in its middle; and a
context manager that it suspends is closed when the last traceback is forgotten, which in a notebook is minutes later.
So what is to be put back is noted before it is changed, once:

    undo = Undo(before.set)
    try:
        ...change...; yield
    finally:
        undo()              once: does nothing where somebody did it before

and whoever sees an exception pass calls ``undo_to``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class _Open(threading.local):
    """What is to be put back on this thread, in order."""

    def __init__(self) -> None:
        self.undos: list[Undo] = []


_OPEN = _Open()


class Undo:
    """``put_back``, which may be done twice in a row, to be done once."""

    __slots__ = ("_open", "_put_back")

    def __init__(self, put_back: Callable[[], None]) -> None:
        self._put_back = put_back
        self._open = _OPEN.undos
        self._open.append(self)

    def __call__(self) -> None:
        """Put back, unless that was done."""
        if self in self._open:
            self._put_back()
            self._open.remove(self)


def num_open() -> int:
    """How many are under way on this thread."""
    return len(_OPEN.undos)


def undo_to(count: int) -> None:
    """An exception passes where ``count`` were under way before: put back what it has cut off, the last first."""
    while len(_OPEN.undos) > count:
        _OPEN.undos[-1]()
