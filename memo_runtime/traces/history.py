"""Reading the CUDA allocator's history: entries as ``torch.cuda.memory._snapshot()`` gives them, into a trace.

The history knows addresses, requested sizes and streams, but not what the program was doing. The recorder
therefore leaves marks in it: two allocations of odd sizes, one after the other, freed at once. They are found
again here, taken out, and become the begins and ends of spans, in order.

    alloc MARK[0]   alloc MARK[1]   free   free        = one mark
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memo_runtime.errors import TraceError
from memo_runtime.traces.trace import Phase, TraceBuilder

#: Bytes of the two requests of a mark. Both round to one block of 512, so that a mark never asks for a new segment of
#: its own size.
MARK = (331, 443)
#: Segments go back to the device only when the program asks for it, or when memory ran short.
_GIVEN_BACK = ("segment_free", "segment_unmap")


@dataclass(frozen=True, slots=True)
class MarkWords:
    """What one mark says."""

    begins: bool
    phase: Phase
    block: str


@dataclass(slots=True)
class _Reader:
    marks: Sequence[MarkWords]
    builder: TraceBuilder = field(default_factory=TraceBuilder)
    numbers: dict[int, int] = field(default_factory=dict)
    ignored: set[int] = field(default_factory=set)
    found: int = 0

    def allocation(self, address: int, size: int, stream: int, *, before: bool = False) -> None:
        self.numbers[address] = self.builder.allocate(size, stream, before=before)

    def mark(self, *addresses: int) -> None:
        self.ignored.update(addresses)
        if self.found < len(self.marks):
            words = self.marks[self.found]
            (self.builder.begin if words.begins else self.builder.end)(words.phase, words.block)
        self.found += 1

    def free(self, address: int) -> None:
        if address in self.ignored:
            self.ignored.remove(address)
        elif address in self.numbers:
            self.builder.free(self.numbers.pop(address))
        else:
            raise TraceError(
                f"the allocator's history frees {address:#x}, which it never allocated: it is longer than what was "
                "kept of it. Record fewer steps, or with a larger max_entries"
            )


def read_history(
    entries: Iterable[Mapping[str, Any]], *, alive: Iterable[Mapping[str, Any]] = (), marks: Sequence[MarkWords] = ()
) -> TraceBuilder:
    """A builder that holds all of a device's history.

    Args:
        entries: ``_snapshot()["device_traces"][device]``. alive: blocks in use when it began (``address``,
            ``requested_size``, ``stream``), in order of address. marks: what was said at each mark.

    Raises:
        TraceError: the history is not whole, or has other marks than those.
    """
    reader = _Reader(marks)
    for block in alive:
        reader.allocation(block["address"], block["requested_size"], block["stream"], before=True)
    # A block is free for others once its streams are done with it, which is when it is "completed".
    events = [e for e in entries if e["action"] in ("alloc", "free_completed", "segment_alloc", *_GIVEN_BACK)]
    at = 0
    while at < len(events):
        entry = events[at]
        if entry["action"] in _GIVEN_BACK:
            reader.builder.release()
        elif entry["action"] == "segment_alloc":
            reader.builder.segment(entry["addr"], entry["size"])
        elif entry["action"] == "free_completed":
            reader.free(entry["addr"])
        elif _is_mark(events[at : at + 2]):
            at += 1
            reader.mark(entry["addr"], events[at]["addr"])
        else:
            reader.allocation(entry["addr"], entry["size"], entry["stream"])
        at += 1
    if reader.found != len(marks):
        raise TraceError(
            f"{len(marks)} marks were made and {reader.found} are in the allocator's history: it is longer than what "
            "was kept of it, or another thread allocated in between"
        )
    return reader.builder


def _is_mark(pair: Sequence[Mapping[str, Any]]) -> bool:
    return tuple((e["action"], e["size"]) for e in pair) == (("alloc", MARK[0]), ("alloc", MARK[1]))
