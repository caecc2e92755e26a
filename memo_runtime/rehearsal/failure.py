"""A step that memory was short for: whether that is what an error says, and where it was raised."""

from __future__ import annotations

import torch
from torch import nn

from memo_runtime.errors import PlanInfeasibleError
from memo_runtime.rehearsal.threads import is_of_a_thread, no_room_for_stacks

#: Messages of allocators that raise a plain RuntimeError: of pinned memory, and of the CPU's.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def ran_out(error: BaseException) -> bool:
    """Whether ``error`` says that memory was short: the device's, the host's, or a budget's.

    To be asked where it was caught, see ``threads.py``.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, PlanInfeasibleError)):
        return True
    if is_of_a_thread(error):
        return no_room_for_stacks()
    return isinstance(error, (RuntimeError, OSError)) and any(text in str(error).lower() for text in _NO_MEMORY)


def innermost_module(error: BaseException, model: nn.Module) -> str:
    """Name of the innermost module of ``model`` whose method ``error`` passed through; "" if there is none."""
    names = {id(module): name for name, module in model.named_modules()}
    found, step = "", error.__traceback__
    while step is not None:
        owner = step.tb_frame.f_locals.get("self")
        found = names.get(id(owner), found) if isinstance(owner, nn.Module) else found
        step = step.tb_next
    return found


def forget(error: BaseException) -> None:
    """Let go of what the frames hold that ``error``, and what it came from, passed through."""
    one: BaseException | None = error
    while one is not None:
        one.__traceback__ = None
        one = one.__cause__ or one.__context__
