"""Recording what the CUDA caching allocator was asked for, from its own history.

Nothing of the program changes: the allocator writes its history itself, and marks (traces/history.py) are two small
allocations each. The history is a ring: one that is too short for the run is an error, not a shorter trace.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from memo_runtime.errors import DeviceUnavailableError
from memo_runtime.profiling.machine import joins_free_memory
from memo_runtime.traces.history import MARK, MarkWords, read_history
from memo_runtime.traces.trace import Measured, Phase, Trace

#: Entries of the ring. A step of a 32-block model makes some 30,000.
_MAX_ENTRIES = 4_000_000


class AllocatorRecorder:
    """Records one CUDA device from ``__enter__`` to ``__exit__``; ``trace`` gives the result afterwards.

    Entered before the model is made, it sees everything; what is in use already counts as there from the start, in
    order of address. Where it is to measure peaks, those of ``torch.cuda.memory_stats`` are reset when it is entered.

    Attributes:
        stream_handles: CUDA handles of the streams of the trace, in the order of their numbers; known with the trace.
    """

    def __init__(
        self, device: torch.device | None = None, *, max_entries: int = _MAX_ENTRIES, measure: bool = True
    ) -> None:
        if not torch.cuda.is_available():
            raise DeviceUnavailableError(
                "the allocator's history is CUDA's, and there is no CUDA device; on CPU and meta tensors "
                "recording.operators.OperatorRecorder records"
            )
        device = torch.device("cuda") if device is None else device
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._max_entries = max_entries
        self._measure = measure
        self.stream_handles: tuple[int, ...] = ()
        self._marks: list[MarkWords] = []
        self._alive: list[dict[str, Any]] = []
        self._entries: list[dict[str, Any]] = []
        self._measured: Measured | None = None

    def __enter__(self) -> AllocatorRecorder:
        torch.cuda.synchronize(self._index)
        self._alive = _in_use(_snapshot(), self._index)
        if self._measure:
            torch.cuda.reset_peak_memory_stats(self._index)
        self._retries = torch.cuda.memory_stats(self._index).get("num_alloc_retries", 0)
        torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=self._max_entries)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None
    ) -> None:
        torch.cuda.synchronize(self._index)
        self._entries = _snapshot()["device_traces"][self._index]
        # Ours has no stacks: where an entry has one, somebody began to record meanwhile, and wants to go on.
        if not any(entry.get("frames") for entry in self._entries):
            torch.cuda.memory._record_memory_history(enabled=None)
        if not self._measure:
            return
        stats = torch.cuda.memory_stats(self._index)
        self._measured = Measured(
            allocated_peak=stats["allocated_bytes.all.peak"],
            reserved_peak=stats["reserved_bytes.all.peak"],
            retries=stats.get("num_alloc_retries", 0) - self._retries,
            num_segments=stats["segment.all.current"],
        )

    def begin(self, phase: Phase, block: str = "") -> None:
        """A span begins."""
        self._mark(MarkWords(True, phase, block))

    def end(self, phase: Phase, block: str = "") -> None:
        """It ends."""
        self._mark(MarkWords(False, phase, block))

    def _mark(self, words: MarkWords) -> None:
        # In this order in the history: both allocated, then both freed.
        pair = [torch.empty(size, dtype=torch.uint8, device=f"cuda:{self._index}") for size in MARK]
        pair.clear()
        self._marks.append(words)

    def trace(self, provenance: dict[str, str] | None = None) -> Trace:
        """What was recorded.

        Raises:
            TraceError: the history was longer than what was kept of it.
        """
        properties = torch.cuda.get_device_properties(self._index)
        words = {
            "recorder": "CUDA allocator history",
            "torch": torch.__version__,
            "device": properties.name,
            **(provenance or {}),
        }
        builder = read_history(self._entries, alive=self._alive, marks=self._marks)
        self.stream_handles = builder.stream_handles
        return builder.build(
            measured=self._measured,
            expandable=joins_free_memory(torch.device("cuda", self._index)),
            capacity_bytes=properties.total_memory,
            provenance=words,
        )


def _snapshot() -> dict[str, Any]:
    snapshot: dict[str, Any] = torch.cuda.memory._snapshot()
    return snapshot


def _in_use(snapshot: dict[str, Any], index: int) -> list[dict[str, Any]]:
    found = []
    for segment in snapshot["segments"]:
        if segment["device"] != index:
            continue
        address = segment["address"]
        for block in segment["blocks"]:
            start = block.get("address", address)
            # Also what was freed and waits for another stream (record_stream): its free is completed later.
            if block["state"].startswith("active"):
                size = block.get("requested_size", block["size"])
                found.append({"address": start, "requested_size": size, "stream": segment["stream"]})
            address = start + block["size"]
    return sorted(found, key=lambda block: block["address"])
