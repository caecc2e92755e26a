"""What an error of a run of a block says: that the block does not run in this way, or something else.

A block that is tried on fewer tokens or run again may raise anything at all, and then it is treated in another way.
Not so for what has nothing to do with it: an interrupt, no memory left, a broken device, an error of the user's making.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

import torch

from memo_runtime.errors import MemoError

#: Errors of the machine: another way of running the block would meet them too.
_OF_THE_MACHINE = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)


class BlockRefusedError(Exception):
    """A block that is left as it is, and why."""


def pass_on(error: Exception) -> None:
    """Raise ``error`` again unless it may be the block's; to be called where it was caught.

    An interrupt that it stands for comes first: one that arrives while a dispatch mode is left makes PyTorch raise a
    RuntimeError over it.
    """
    here = sys._getframe(1)
    for behind in _chain(error):
        if not isinstance(behind, Exception) and _came_from_below(behind, here):
            raise behind
    if isinstance(error, (MemoError, *_OF_THE_MACHINE)):
        raise error


def first_line(error: BaseException) -> str:
    """Class and first line of what was raised, for a reason in a report."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def _came_from_below(error: BaseException, frame: FrameType) -> bool:
    """``error`` was raised in what ``frame`` ran, and is none that a caller of it is handling."""
    top = error.__traceback__.tb_frame if error.__traceback__ is not None else None
    caller = frame.f_back
    while caller is not None:
        if caller is top:
            return False
        caller = caller.f_back
    return True


def _chain(error: BaseException) -> Iterator[BaseException]:
    """What ``error`` was raised from, or in the course of."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__cause__, one.__context__]
