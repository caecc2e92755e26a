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

and whoever sees an exception pass asks the ``Surroundings`` that it started in to put back what is left.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from memo_runtime.blocks.aside import DEPTH


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


class Surroundings:
    """What is in force on this thread when something starts: to be put back when an exception passes through it.

    A context manager that was interrupted when it had begun, and before its ``with`` knew, ends nothing: dispatch modes
    and hooks would stay, and replace operators of later steps.
    """

    __slots__ = ("_aside", "_functions", "_grad", "_hooks", "_modes", "_undos")

    def __init__(self) -> None:
        self._undos = len(_OPEN.undos)
        self._aside = DEPTH.count
        self._modes = torch._C._len_torch_dispatch_stack()
        self._functions = torch._C._len_torch_function_stack()
        self._hooks = _hooks()
        self._grad = torch.is_grad_enabled()

    def restore(self) -> None:
        """Leave what was entered since, the last first, and put back what it has changed."""
        DEPTH.count = self._aside
        while torch._C._len_torch_dispatch_stack() > self._modes:
            _leave_mode()
        while torch._C._len_torch_function_stack() > self._functions:
            torch._C._pop_torch_function_stack()
        while (hooks := _hooks()) is not None and (self._hooks is None or hooks[0] is not self._hooks[0]):
            torch._C._autograd._pop_saved_tensors_default_hooks()
        torch._C._set_grad_enabled(self._grad)
        while len(_OPEN.undos) > self._undos:
            _OPEN.undos[-1]()


def _hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _leave_mode() -> None:
    before = torch._C._len_torch_dispatch_stack()
    # Its own way out puts PyTorch's flags back too; where it had been on it already, there are none to put back.
    with contextlib.suppress(IndexError):
        _get_current_dispatch_mode_stack()[-1].__exit__(None, None, None)
    if torch._C._len_torch_dispatch_stack() == before:
        torch._C._pop_torch_dispatch_stack(None)
