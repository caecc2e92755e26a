"""What happened (Report): frozen, torch-free values, as execution makes them and ``memo.report`` gives them."""

from __future__ import annotations

from dataclasses import dataclass

from memo_runtime.placement import ArenaReport
from memo_runtime.records import Executor, Forecast, ModelStates


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReport:
    """What one block did in the last step; ``attention``: the kernels that it chose by tiles."""

    name: str
    executor: Executor
    reason: str
    alpha: float
    bytes_to_host: int
    bytes_to_device: int
    bytes_kept: int
    recomputed_flops: int
    attention: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over the blocks and peaks of the last step, beside their forecast.

    ``peak_bytes`` is ``torch.cuda.max_memory_allocated`` on CUDA; on CPU, where no allocator counts, it is the
    model's states plus the peak of the stash. ``host_bytes`` is host memory reserved, ``open_copies`` the copies
    still in flight.
    """

    bytes_to_host: int
    bytes_to_device: int
    bytes_kept: int
    recomputed_flops: int
    peak_bytes: int
    stash_peak_bytes: int
    stash_bytes: int
    host_bytes: int
    host_bytes_in_use: int
    open_copies: int
    step_seconds: float
    steps: int
    forecast: Forecast


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a wrapped model did in its last step; ``copies``: who made them; ``arena``: planned memory."""

    policy: str
    blocks: tuple[BlockReport, ...]
    totals: Totals
    states: ModelStates | None
    notes: tuple[str, ...] = ()
    copies: str = ""
    arena: ArenaReport | None = None

    def __str__(self) -> str:
        from memo_runtime.reporting.report_table import report_table

        return report_table(self)
