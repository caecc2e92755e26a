"""Large synthetic training traces: peak over lower bound, time and memory, beside omnimalloc.

    python -m benchmarks.solver.traces --limit 10
"""

from __future__ import annotations

import argparse

from benchmarks.solver.contenders import memo, omnimalloc, timed
from benchmarks.solver.provenance import append_row
from memo_solver.sections import split
from memo_solver.training import training_trace

CASES = ((20_000, 1), (20_000, 4), (30_000, 5), (40_000, 2), (50_000, 6), (60_000, 3))
"""Number of requests and seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=9.0)
    parser.add_argument("--rival-limit", type=float, default=60.0)
    arguments = parser.parse_args()
    for num_requests, seed in CASES:
        problem = training_trace(num_requests, seed=seed)
        bound = max(max(s.loads()) * s.unit for s in split(problem))
        for name, contender in {"memo_solver": memo, "omnimalloc omni": omnimalloc("omni")}.items():
            limit = arguments.limit if contender is memo else arguments.rival_limit
            run = timed(contender, problem, limit)
            peak = run["peak"]
            row = {
                "contender": name,
                "instance": f"training trace, {len(problem.requests)} requests, seed {seed}",
                "limit_seconds": limit,
                "lower_bound": bound,
                "waste": None if peak is None else peak / bound - 1,
                **run,
            }
            append_row("traces", row)
            print(name, row["instance"], row["waste"], row["seconds"], run["peak_rss_mib"], flush=True)


if __name__ == "__main__":
    main()
