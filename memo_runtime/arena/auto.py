"""``layout='auto'``: memory of steps by plan where PyTorch's allocator might run short of it, and the other is built.

What lives in a step says little of what PyTorch's allocator reserves for it: up to a quarter more, and two thirds more
where lengths vary (docs/allocator.md has rows). Where that much is free, nothing is gained by planning.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from memo_runtime.allocator.library import allocator_status, planned_allocator
from memo_runtime.arena.model import StepMemory
from memo_runtime.arena.plan import ROOMY, allowed_bytes
from memo_runtime.arena.steps import is_planned_for_others
from memo_runtime.errors import AllocatorUnavailableError
from memo_runtime.units import format_bytes


def memory_if_short(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    note: Callable[[str], None],
    peak_bytes: int,
    device: torch.device,
) -> StepMemory | None:
    """What ``layout='planned'`` has, for a step that needs ``peak_bytes`` of ``device``, and a note of it.

    None: it is left to PyTorch's allocator, since there is room, the planned one is not built, or the device's arena is
    another wrapped model's.
    """
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    allowed = allowed_bytes(index)
    if peak_bytes <= ROOMY * allowed or is_planned_for_others(index) or not allocator_status().available:
        return None
    try:
        planned_allocator().install()
    except AllocatorUnavailableError as error:
        note(f"memory of steps is left to PyTorch's allocator: {error}")
        return None
    note(
        f"layout 'auto': memory of steps is placed by plan, since a step needs {format_bytes(peak_bytes)} of the "
        f"{format_bytes(allowed)} that this process may reserve, and PyTorch's allocator may take a quarter more; "
        "layout='native' leaves it to that"
    )
    return StepMemory(model, optimizer, note)
