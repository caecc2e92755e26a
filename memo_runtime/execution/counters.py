"""What each block did in a step, counted where it happens."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import torch

from memo_runtime.records import Executor
from memo_runtime.reports import BlockReport


@dataclass(slots=True)
class BlockCounters:
    """One block in one step."""

    name: str
    executor: Executor = Executor.NATIVE
    reason: str = ""
    alpha: float = 1.0
    bytes_to_host: int = 0
    bytes_to_device: int = 0
    bytes_kept: int = 0
    recomputed_flops: int = 0
    attention: tuple[str, ...] = ()

    def report(self) -> BlockReport:
        """The counts as a record."""
        return BlockReport(
            name=self.name,
            executor=self.executor,
            reason=self.reason,
            alpha=self.alpha,
            bytes_to_host=self.bytes_to_host,
            bytes_to_device=self.bytes_to_device,
            bytes_kept=self.bytes_kept,
            recomputed_flops=self.recomputed_flops,
            attention=self.attention,
        )


class Clock:
    """Seconds between two points of a step, without a synchronisation until they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start = self._mark()
        self._stop = self._start

    def _mark(self) -> torch.cuda.Event | float:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def touch(self) -> None:
        """The step lasts at least until here."""
        self._stop = self._mark()

    def seconds(self) -> float:
        """From the start to the last touch."""
        if isinstance(self._start, torch.cuda.Event) and isinstance(self._stop, torch.cuda.Event):
            self._stop.synchronize()
            return float(self._start.elapsed_time(self._stop)) / 1e3
        assert isinstance(self._start, float) and isinstance(self._stop, float), "both marks are of one kind"
        return self._stop - self._start


@dataclass(slots=True)
class StepCounters:
    """One step: its blocks, its time, and how far it is."""

    clock: Clock
    blocks: dict[str, BlockCounters] = field(default_factory=dict)
    backward_seen: bool = False
    in_forward: bool = False
    in_backward: bool = False
    #: A block's forward raised.
    failed: bool = False
    #: A block ran without gradients in the model's forward, which has them; a forward without any came since.
    passed_by: bool = False
    evaluated: bool = False
    owner: threading.Thread = field(default_factory=threading.current_thread)

    def block(self, name: str) -> BlockCounters:
        """The counters of block ``name``."""
        if name not in self.blocks:
            self.blocks[name] = BlockCounters(name)
        return self.blocks[name]

    def end_backward(self) -> None:
        """A backward pass through this step is over."""
        self.in_backward = False
        self.clock.touch()
