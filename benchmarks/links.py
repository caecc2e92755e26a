"""Measures pinning and copies through the copy engine on a GPU, and appends one row with provenance.

    python -m benchmarks.links --out benchmarks/results/links_h100.jsonl --commit HASH

Rates are medians of five, in bytes per second; times in seconds. The slab is of the size that issue and design speak
of, 16 GiB, and the copies go through its whole length. ``raw_rates`` are the same copies by PyTorch on two streams,
into the same pinned memory: what this machine's links give to anyone. Takes under a minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.provenance import gpu_facts, now, versions
from memo_runtime.native.backend import Backend, choose_backend
from memo_runtime.native.engine import CopyEngine
from memo_runtime.native.slab import Slab
from memo_runtime.units import GiB, MiB, parse_bytes

REPEATS = 5
#: Bytes of one large copy.
LARGE = GiB
#: Sizes that a pool of powers of two would nearly double.
AWKWARD = (MiB + 1, 37 * MiB + 12_345, 333_333_333, 1_400_000_001)


def median_seconds(run: Callable[[], None], repeats: int = REPEATS) -> float:
    """Median wall time of ``run`` with the device idle before and after; one warm-up."""
    seconds = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def pin(backend: Backend, size_bytes: int) -> tuple[Slab, float]:
    """A slab and the seconds that it took."""
    torch.zeros(1, device=backend.device)
    start = time.perf_counter()
    slab = backend.slab(size_bytes)
    return slab, time.perf_counter() - start


def huge_page_bytes() -> int:
    """Bytes of this process on huge pages: both directions together are a tenth slower from small ones."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("AnonHugePages"):
            return int(line.split()[1]) * 1024
    return 0


def awkward_overhead(backend: Backend) -> float:
    """Pinned over asked bytes, less 1, for the worst of the awkward sizes."""
    worst = 0.0
    for size in AWKWARD:
        slab = backend.slab(size)
        worst = max(worst, slab.mapped / size - 1)
        slab.close()
    return worst


def rates(engine: CopyEngine, slab: Slab) -> dict[str, float]:
    """Bytes per second to the host, to the device, both at once (their sum), and of token slices to the host."""
    half = slab.size // 2 // LARGE * LARGE
    outside = [slab.memory[i : i + LARGE] for i in range(0, half, LARGE)]
    inside = [slab.memory[half + i : half + i + LARGE] for i in range(0, half, LARGE)]
    source = torch.ones(LARGE, dtype=torch.uint8, device=engine.device)
    target = torch.empty(LARGE, dtype=torch.uint8, device=engine.device)

    def to_host() -> None:
        for ticket in [engine.to_host(source, host) for host in outside]:
            ticket.wait()

    def to_device() -> None:
        for ticket in [engine.to_device(host, target) for host in inside]:
            ticket.wait()

    def both() -> None:
        tickets = []
        for one, other in zip(outside, inside, strict=True):
            tickets += [engine.to_host(source, one), engine.to_device(other, target)]
        for ticket in tickets:
            ticket.wait()

    # Half of the tokens of 32 heads: runs of 16 MiB in bf16, as replay cuts [heads, tokens, head size].
    rows = source.view(torch.bfloat16).view(32, -1, 128)
    rows = rows[:, : rows.shape[1] // 2]
    slices = [host.view(torch.bfloat16)[: rows.numel()].view(rows.shape) for host in outside]

    def sliced() -> None:
        for ticket in [engine.to_host(rows, host) for host in slices]:
            ticket.wait()

    total = len(outside) * LARGE
    return {
        "to_host": total / median_seconds(to_host),
        "to_device": total / median_seconds(to_device),
        "both": 2 * total / median_seconds(both),
        "slices_to_host": total / 2 / median_seconds(sliced),
    }


def raw_rates(slab: Slab, device: torch.device) -> dict[str, float]:
    """Bytes per second of PyTorch's own copies: to the host, to the device, both at once (their sum)."""
    half = slab.size // 2 // LARGE * LARGE
    outside = [slab.memory[i : i + LARGE] for i in range(0, half, LARGE)]
    inside = [slab.memory[half + i : half + i + LARGE] for i in range(0, half, LARGE)]
    source = torch.ones(LARGE, dtype=torch.uint8, device=device)
    target = torch.empty(LARGE, dtype=torch.uint8, device=device)
    out, back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def copies(*, to_host: bool, to_device: bool) -> Callable[[], None]:
        def run() -> None:
            for one, other in zip(outside, inside, strict=True):
                if to_host:
                    with torch.cuda.stream(out):
                        one.copy_(source, non_blocking=True)
                if to_device:
                    with torch.cuda.stream(back):
                        target.copy_(other, non_blocking=True)

        return run

    total = len(outside) * LARGE
    return {
        "to_host": total / median_seconds(copies(to_host=True, to_device=False)),
        "to_device": total / median_seconds(copies(to_host=False, to_device=True)),
        "both": 2 * total / median_seconds(copies(to_host=True, to_device=True)),
    }


def host_times(engine: CopyEngine, slab: Slab, rounds: int = 100) -> dict[str, float]:
    """Host seconds per copy in Python: to submit one, to wait for one, to submit one of 16 in a batch.

    With 16 copies or one batch under way at a time: replay has one batch of about ten for a block. ``raw``: the same
    submission by PyTorch, an event before and behind ``copy_`` on a side stream.
    """
    device = torch.empty(16, 16, 4096, dtype=torch.uint8, device=engine.device)
    one, host = device[:, 0:8], slab.memory[: 16 * 8 * 4096].view(16, 8, 4096)
    pairs = [(device[i], slab.memory[i * 65536 : (i + 1) * 65536].view(16, 4096)) for i in range(16)]
    side = torch.cuda.Stream(engine.device)
    figures: dict[str, list[float]] = {"submit": [], "wait": [], "batched": [], "raw": []}
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        tickets = [engine.to_host(one, host, name="layers.0 block") for _ in range(16)]
        submitted = time.perf_counter()
        for ticket in tickets:
            ticket.wait()
        waited = time.perf_counter()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        batch = engine.many_to_host(pairs, name="layers.0 block")
        ended = time.perf_counter()
        batch.wait()
        torch.cuda.synchronize()
        raw_begun = time.perf_counter()
        for _ in range(16):
            ready, copied = torch.cuda.Event(), torch.cuda.Event()
            ready.record()
            with torch.cuda.stream(side):
                side.wait_event(ready)
                host.copy_(one, non_blocking=True)
                copied.record()
        raw_ended = time.perf_counter()
        figures["raw"].append((raw_ended - raw_begun) / 16)
        figures["submit"].append((submitted - start) / 16)
        figures["wait"].append((waited - submitted) / 16)
        figures["batched"].append((ended - begun) / 16)
    torch.cuda.synchronize()
    return {name: statistics.median(values[1:]) for name, values in figures.items()}


def measure(mode: str, pin_bytes: int) -> dict[str, Any]:
    """Everything, for the backend of ``mode``."""
    backend = choose_backend(torch.device("cuda", 0), mode)
    slab, seconds = pin(backend, pin_bytes)
    engine = backend.engine()
    figures = {
        "contender": backend.name,
        "asked_bytes": pin_bytes,
        "pinned_bytes": slab.mapped,
        "pin_seconds": seconds,
        "on_numa_node": slab.on_node,
        "huge_page_bytes": huge_page_bytes(),
        "awkward_overhead": awkward_overhead(backend),
        "rates": rates(engine, slab),
        "raw_rates": raw_rates(slab, backend.device),
        "host_seconds": host_times(engine, slab),
    }
    start = time.perf_counter()
    engine.close()
    slab.close()
    return {**figures, "unpin_seconds": time.perf_counter() - start}


def shown(row: dict[str, Any]) -> str:
    """The row as a short table."""
    rate, host = row["rates"], row["host_seconds"]
    lines = [
        ("backend", row["contender"]),
        ("pinned", f"{row['pinned_bytes'] / GiB:.2f} GiB in {row['pin_seconds']:.2f} s"),
        ("freed", f"in {row['unpin_seconds']:.2f} s"),
        ("awkward sizes", f"{row['awkward_overhead']:.4%} above what was asked, at most"),
        *((name.replace("_", " "), f"{value / 1e9:.1f} GB/s") for name, value in rate.items()),
        *((f"raw, {name.replace('_', ' ')}", f"{value / 1e9:.1f} GB/s") for name, value in row["raw_rates"].items()),
        *((f"host, {name}", f"{value * 1e6:.1f} us a copy") for name, value in host.items()),
    ]
    return "\n".join(f"{name:16} {value}" for name, value in lines)


def main() -> int:
    """Measure, print and append the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="JSON-lines file to append to")
    parser.add_argument("--commit", required=True, help="commit of the tree that runs")
    parser.add_argument("--native", default="on", choices=("auto", "on", "off"), help="which backend")
    parser.add_argument("--pin", default="16GiB", type=parse_bytes, help="bytes to pin, at least 2GiB")
    options = parser.parse_args()
    row = {
        "run": "links",
        "status": "ok",
        **measure(options.native, options.pin),
        "config": {"native": options.native, "pin": options.pin},
        **gpu_facts(),
        "commit": options.commit,
        "date": now(),
        "versions": versions(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(shown(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
