"""Tries what could slow both directions of the link together, and where the host time of a copy goes. Prints tables.

    python -m benchmarks.link_variants          about 30 seconds on a GPU

Both directions run at once, 4 GiB each. ``whole`` is all bytes over the time until the slower direction ends; ``while
both`` counts only the time in which both run, so that a tail in which one direction runs alone shows as a difference.
Nothing is written: what is found here goes into the engine, and benchmarks.links measures that.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from benchmarks.links import huge_page_bytes
from memo_runtime.native.backend import Backend, choose_backend
from memo_runtime.native.compiled import CompiledEngine
from memo_runtime.native.engine import CopyEngine
from memo_runtime.native.library import CUDA_DRIVER, Library, library, packing
from memo_runtime.native.runs import six_numbers
from memo_runtime.reporting.text_table import table
from memo_runtime.units import GiB, MiB

DEVICE = torch.device("cuda", 0)
BYTES = 4 * GiB
REPEATS = 3
#: What madvise calls huge pages: asked for, and refused.
_HUGE, _SMALL = 14, 15

Copy = Callable[[torch.Tensor, torch.Tensor, bool], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Bytes per second of each direction while both run, and of all bytes over all of the time."""

    out: float
    back: float
    whole: float


class Course:
    """Two streams with a mark behind every copy of each."""

    def __init__(self, streams: tuple[torch.cuda.Stream, torch.cuda.Stream]) -> None:
        self.streams = streams
        self.marks: tuple[list[torch.cuda.Event], list[torch.cuda.Event]] = ([], [])

    def mark(self, direction: int) -> None:
        """Note the time at which this direction has come here."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.streams[direction])
        self.marks[direction].append(event)

    def outcome(self, copy_bytes: int) -> Outcome:
        """Rates, by interpolation between marks where one direction ended first."""
        torch.cuda.synchronize()
        start = self.marks[0][0]
        times = [[start.elapsed_time(mark) / 1e3 for mark in marks] for marks in self.marks]
        begin, end = max(one[0] for one in times), min(one[-1] for one in times)
        rates = [_between(one, copy_bytes, begin, end) / max(1e-9, end - begin) for one in times]
        total = sum(copy_bytes * (len(one) - 1) for one in times)
        last, first = max(one[-1] for one in times), min(one[0] for one in times)
        return Outcome(rates[0], rates[1], total / (last - first))


def _between(times: list[float], copy_bytes: int, begin: float, end: float) -> float:
    done = 0.0
    for one, other in pairwise(times):
        share = min(other, end) - max(one, begin)
        done += copy_bytes * max(0.0, share) / max(1e-9, other - one)
    return done


def both(outside: torch.Tensor, inside: torch.Tensor, size: int, course: Course, copy: Copy) -> Outcome:
    """Copies of ``size`` bytes, one to the host into ``outside``, one to the device from ``inside``, in turn."""
    far = [torch.ones(size, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    torch.cuda.synchronize()
    for direction in (0, 1):
        course.mark(direction)
    for begin in range(0, outside.numel(), size):
        copy(far[0], outside[begin : begin + size], True)
        course.mark(0)
        copy(inside[begin : begin + size], far[1], False)
        course.mark(1)
    return course.outcome(size)


def raw(outside: torch.Tensor, inside: torch.Tensor, size: int) -> Outcome:
    """PyTorch's copies on two streams: no engine, no event between the streams."""
    streams = (torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE))

    def copy(source: torch.Tensor, target: torch.Tensor, out: bool) -> None:
        with torch.cuda.stream(streams[0 if out else 1]):
            target.copy_(source, non_blocking=True)

    return both(outside, inside, size, Course(streams), copy)


def through(engine: CopyEngine, outside: torch.Tensor, inside: torch.Tensor, size: int) -> Outcome:
    """Copies of the engine."""
    handles = [engine.stream_handle(to_host=out) for out in (True, False)]
    one, other = (torch.cuda.ExternalStream(handle, device=DEVICE) for handle in handles)
    tickets = []

    def copy(source: torch.Tensor, target: torch.Tensor, out: bool) -> None:
        tickets.append(engine.to_host(source, target) if out else engine.to_device(source, target))

    found = both(outside, inside, size, Course((one, other)), copy)
    for ticket in tickets:
        ticket.wait()
    return found


def registered(advice: int | None) -> Iterator[torch.Tensor]:
    """Mapped memory with or without huge pages, registered in one piece; unpinned when the next is asked for."""
    mapping = mmap.mmap(-1, 2 * BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if advice is not None:
        mapping.madvise(advice)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    memory.fill_(1)
    torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 1)
    yield memory
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def variants(backend: Backend) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """Every way of copying that is tried, with its name."""
    engine = backend.engine()
    slab = backend.slab(2 * BYTES)
    one, other = slab.memory[:BYTES], slab.memory[BYTES:]
    print(f"slab of {slab.size / GiB:.0f} GiB: {huge_page_bytes() / GiB:.1f} GiB of this process on huge pages")
    for size in (GiB, 256 * MiB, 64 * MiB, 16 * MiB, 4 * MiB):
        yield f"engine, slab, {size // MiB} MiB a copy", partial(through, engine, one, other, size)
    for size in (GiB, 64 * MiB):
        yield f"torch streams, slab, {size // MiB} MiB", partial(raw, one, other, size)
    engine.close()
    slab.close()
    for name, advice in (("huge pages", _HUGE), ("small pages", _SMALL)):
        for memory in registered(advice):
            yield f"torch streams, mapped, {name}, 1024 MiB", partial(raw, memory[:BYTES], memory[BYTES:], GiB)
    pinned = torch.empty(2 * BYTES, dtype=torch.uint8, pin_memory=True)
    for size in (GiB, 64 * MiB):
        yield f"torch streams, cudaHostAlloc, {size // MiB} MiB", partial(raw, pinned[:BYTES], pinned[BYTES:], size)


def links() -> str:
    """The first table."""
    rows = []
    for name, run in variants(choose_backend(DEVICE, "on")):
        found = [run() for _ in range(REPEATS)][1:]
        best = max(found, key=lambda one: one.whole)
        rates = (best.out, best.back, best.out + best.back, best.whole)
        rows.append((name, *(f"{rate / 1e9:.1f}" for rate in rates)))
    return table(("both directions, GB/s", "to host", "to device", "while both", "whole"), rows, text_columns=(0,))


def each(run: Callable[[], object], count: int = 400) -> float:
    """Microseconds of host time of one call, the device idle before; the best of five."""
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            run()
        best = min(best, (time.perf_counter() - start) / count)
    torch.cuda.synchronize()
    return best * 1e6


def host_times() -> str:
    """The second table: a copy in Python, what of it is the core, and the driver's calls in that."""
    backend = choose_backend(DEVICE, "on")
    engine, slab = backend.engine(), backend.slab(64 * MiB)
    assert isinstance(engine, CompiledEngine), "mode on gives the core's engine"
    device = torch.empty(16, 16, 4096, dtype=torch.uint8, device=DEVICE)
    shapes = {"one run": (device[0], slab.memory[: device[0].numel()].view(device[0].shape))}
    rows16 = device[:, 0:8]
    shapes["16 runs"] = (rows16, slab.memory[: rows16.numel()].view(rows16.shape))
    pairs = [(device[i], slab.memory[i * 65536 : (i + 1) * 65536].view(16, 4096)) for i in range(16)]
    rows = []
    core = library()
    for name, (source, host) in shapes.items():
        rows.append((f"submit and wait, {name}", each(partial(_submitted, engine, source, host))))
        request = packing(1).pack(engine._handle, 0, 0, 1, *six_numbers(host, source))
        rows.append((f"of that in the core, {name}", each(partial(_in_core, core, engine._handle, request))))
    rows.append(("16 in a batch, each", each(lambda: engine.many_to_host(pairs, name="x").wait(), 40) / 16))
    rows += driver_times(slab.memory.data_ptr(), device.data_ptr())
    engine.close()
    slab.close()
    return table(("host time", "us"), [(name, f"{us:.2f}") for name, us in rows], text_columns=(0,))


def _submitted(engine: CopyEngine, source: torch.Tensor, host: torch.Tensor) -> None:
    engine.to_host(source, host, name="layers.0 block").wait()


def _in_core(core: Library, engine: int, request: bytes) -> None:
    core.wait(engine, core.submit(request, b"layers.0 block"), 0)


def driver_times(host: int, device: int) -> list[tuple[str, float]]:
    """The driver's own calls by ctypes, less a call that does nothing."""
    driver = ctypes.CDLL(CUDA_DRIVER)
    stream, other, event, kind = (ctypes.c_void_p() for _ in range(4))
    for one in (stream, other):
        driver.cuStreamCreate(ctypes.byref(one), 1)
    driver.cuEventCreate(ctypes.byref(event), 2)
    u64 = ctypes.c_uint64
    nothing = each(lambda: driver.cuCtxGetCurrent(ctypes.byref(kind)))
    calls: dict[str, Callable[[], object]] = {
        "cuEventRecord": lambda: driver.cuEventRecord(event, stream),
        "cuStreamWaitEvent": lambda: driver.cuStreamWaitEvent(other, event, 0),
        "cuMemcpyDtoHAsync 64 KiB": lambda: driver.cuMemcpyDtoHAsync_v2(u64(host), u64(device), u64(65536), stream),
        "cuPointerGetAttribute": lambda: driver.cuPointerGetAttribute(ctypes.byref(kind), 9, u64(device)),
    }
    return [("a ctypes call", nothing), *((name, each(call) - nothing) for name, call in calls.items())]


def main() -> int:
    """Print both tables."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return 2
    print(host_times(), flush=True)
    print(links())
    return 0


if __name__ == "__main__":
    sys.exit(main())
