"""The device's peak in a step, against the limit that the step's plan obeys.

Where an allocator counts (CUDA), its statistics are the user's: they are read and never reset. A step is known to have
made a peak if the highest mark is higher at the end of its backward than at its start. What stays below a mark that
was there before is not seen; whoever made that mark held more.
"""

from __future__ import annotations

import torch

from memo_runtime.execution.ledger import Ledger
from memo_runtime.records import Plan
from memo_runtime.units import format_bytes


def device_peak(device: torch.device, ledger: Ledger, plan: Plan | None) -> int:
    """Most bytes allocated on ``device``; on CPU, where no allocator counts, the model's and ``ledger``'s peak."""
    if device.type == "cuda":
        return _most_allocated(device)
    states = plan.profile.states if plan is not None else None
    fixed = states.parameters + states.buffers + states.gradients + states.optimizer if states else 0
    return fixed + ledger.peak


def _most_allocated(device: torch.device) -> int:
    """As ``torch.cuda.max_memory_allocated``, without the hundred figures that it sorts: a step waits for it."""
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    return int(stats["allocated_bytes"]["all"]["peak"]) if stats else 0


class PeakWatch:
    """Tells of steps that take more than their plan may; once for every limit."""

    def __init__(self) -> None:
        self._before = 0
        self._told: set[int] = set()

    def begin(self, device: torch.device) -> None:
        """A step starts."""
        self._before = _most_allocated(device) if device.type == "cuda" else 0

    def end(self, device: torch.device, ledger: Ledger, plan: Plan | None) -> str:
        """A backward pass is over: what to say, "" if it kept within its limit or that was said before."""
        # Without a budget nothing limits a CPU, where device and host are the same memory.
        limit = plan.limits.device_bytes if plan is not None else 0
        if plan is None or not limit or limit in self._told:
            return ""
        peak = device_peak(device, ledger, plan)
        if peak <= max(limit, self._before):
            return ""
        self._told.add(limit)
        over, forecast = format_bytes(peak - limit), format_bytes(plan.forecast.peak_bytes)
        return (
            f"a step took {format_bytes(peak)} on the device, {over} more than the limit of its plan "
            f"({format_bytes(limit)}, {plan.limits.device_source}; forecast {forecast}): what it held was not all "
            "planned, see the notes on its blocks; a budget that is smaller by as much leaves room for it"
        )
