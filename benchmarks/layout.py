"""Plans the layout of recorded steps and says what it is worth: one row per trace.

    python -m benchmarks.layout benchmarks/traces/h100 --out benchmarks/results/layout_h100.jsonl

Bytes of one steady step: the lower bound of what is planned, the bi-level plan, the flat heuristic, MEMO's rectangles,
and what PyTorch's allocator reserves (simulated, from an empty allocator that first holds what outlives the step):
``default``, with expandable segments, and with the plan's arena. ``run_reserved`` is of the whole recorded run,
simulated, beside what the device counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.provenance import commit, cpu_name, now, versions
from memo_runtime.planning.layout import Layout, plan_layout
from memo_runtime.simulation.replay import simulate
from memo_runtime.traces.trace import Trace
from memo_runtime.traces.trace_file import load_trace
from memo_runtime.traces.windows import last_step, steady_trace


def reserved(trace: Trace, layout: Layout) -> dict[str, int]:
    """Reserved peaks of the planned step: PyTorch's default, expandable segments, and with the arena."""
    steady, originals = steady_trace(trace, last_step(trace))
    planned = set(layout.placed)
    placed = {index for index, original in enumerate(originals) if original in planned}
    return {
        "reserved_default": simulate(steady, expandable=False).reserved_peak,
        "reserved_expandable": simulate(steady, expandable=True).reserved_peak,
        "reserved_planned": simulate(
            steady, expandable=False, arena_bytes=layout.peak, placed=placed
        ).reserved_peak,
    }


def make_row(name: str, trace: Trace, *, seconds: float, threads: int) -> dict[str, Any]:
    """The row of one trace."""
    layout = plan_layout(trace, seconds=seconds, threads=threads)
    run, measured = simulate(trace), trace.measured
    return {
        "trace": name,
        "requests": len(layout.rows),
        "streams": len(layout.arenas),
        "blocks": sum(arena.num_blocks for arena in layout.arenas),
        "distinct_blocks": sum(arena.num_distinct for arena in layout.arenas),
        "lower_bound": layout.lower_bound,
        "peak": layout.peak,
        "ratio": layout.peak / layout.lower_bound,
        "flat_peak": layout.flat_peak,
        "rectangle_peak": layout.rectangle_peak,
        "resident_bytes": layout.resident_bytes,
        "plan_seconds": round(layout.seconds, 3),
        **reserved(trace, layout),
        "run_reserved": run.reserved_peak,
        "run_reserved_measured": None if measured is None else measured.reserved_peak,
        "run_retries": run.retries,
        "recorded": trace.provenance,
        "cpu": cpu_name(),
        "load": os.getloadavg()[0],
        "commit": commit(),
        "date": now(),
        "versions": versions(("torch", "ortools")),
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the rows and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with traces (*.json.gz)")
    parser.add_argument("--out", required=True, type=Path, help="JSON-lines file, written anew")
    parser.add_argument("--seconds", type=float, default=10.0, help="limit of the solver for one trace")
    parser.add_argument("--threads", type=int, default=1, help="threads of the solver")
    options = parser.parse_args(arguments)
    files = sorted(options.folder.glob("*.json.gz"))
    if not files:
        print(f"no *.json.gz in {options.folder}", file=sys.stderr)
        return 2
    rows = []
    for file in files:
        name = file.name.removesuffix(".json.gz")
        rows.append(make_row(name, load_trace(file), seconds=options.seconds, threads=options.threads))
        row = rows[-1]
        peaks = (row["reserved_default"], row["reserved_expandable"], row["reserved_planned"])
        reserved_gib = " ".join(f"{peak / 2**30:.2f}" for peak in peaks)
        print(f"{name}: ratio {row['ratio']:.5f}, reserved default, expandable, planned {reserved_gib} GiB, "
              f"{row['plan_seconds']} s", flush=True)  # fmt: skip
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
