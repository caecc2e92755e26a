"""Seconds of an optimizer's step: it waits for memory, so what it reads and writes says how long it takes."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

import torch
from torch import nn

from memo_runtime.blocks.stopwatch import typical
from memo_runtime.profiling.states import measure_states
from memo_runtime.profiling.stepping import fused_bytes, stepping_of
from memo_runtime.records import Growth

logger = logging.getLogger("memo_runtime")

#: Bytes that are copied to see how fast memory is: several times what caches hold.
_COPIED = 256 << 20


def with_optimizer(outside: Growth, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Growth:
    """``outside``, seconds of what is no block's, and the step of ``optimizer`` on a GPU; None: a fused AdamW's."""
    parameter = next((one for one in model.parameters() if one.requires_grad), None)
    if parameter is None or parameter.device.type != "cuda":
        return outside
    try:
        rate = memory_rate(parameter.device)
    except torch.OutOfMemoryError as error:
        logger.info("memo: the optimizer's step is not in the forecast, there is no room to time a copy: %s", error)
        return outside
    return replace(outside, constant=outside.constant + moved_bytes(model, optimizer) / rate)


def moved_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes that a step of ``optimizer`` reads and writes; of one that cannot be asked, those of one kernel."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps optimizers
    found = None if inner is None else stepping_of(inner, "cuda")
    if found is not None:
        return found.moved
    states = measure_states(model, optimizer, "cuda")
    trained = sum(getattr(one, "_local_tensor", one).nbytes for one in model.parameters() if one.requires_grad)
    return fused_bytes(trained, states.gradients, states.optimizer)


@functools.lru_cache(maxsize=8)
def memory_rate(device: torch.device) -> float:
    """Bytes per second that a copy on ``device`` reads and writes; once per process.

    Raises:
        torch.OutOfMemoryError: there is no room for one.
    """
    source = torch.zeros(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (seconds,) = typical([lambda: target.copy_(source)], device)
    return 2 * _COPIED / seconds
