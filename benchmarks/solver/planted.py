"""Planted perfect packings: how many of N seeds are solved within the limit.

    python -m benchmarks.solver.planted --low 100 --high 200 --seeds 100 --limit 15
"""

from __future__ import annotations

import argparse
import random

from benchmarks.solver.contenders import bare_cpsat, memo, omnimalloc, timed
from benchmarks.solver.provenance import append_row
from memo_solver import Problem
from memo_solver.instances import planted_packing

SHAPES = ((1000, 4096), (100_000, 1_000_000), (200, 64), (60, 100))
"""Width and height of the box that is cut: from all distinct to a coarse grid."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--low", type=int, default=100)
    parser.add_argument("--high", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--limit", type=float, default=15.0)
    parser.add_argument("--shape", type=int, default=0, help="index into SHAPES")
    parser.add_argument("--rivals", type=int, default=0, help="seeds on which rivals run too")
    arguments = parser.parse_args()
    width, height = SHAPES[arguments.shape]
    contenders = {
        "memo_solver": memo,
        "cp-sat": bare_cpsat,
        "omnimalloc supermalloc": omnimalloc("supermalloc"),
        "omnimalloc omni": omnimalloc("omni"),
    }
    for name, contender in contenders.items():
        runs = []
        count = arguments.seeds if name == "memo_solver" else min(arguments.rivals, arguments.seeds)
        for seed in range(arguments.first_seed, arguments.first_seed + count):
            n = random.Random(seed).randint(arguments.low, arguments.high)
            problem = planted_packing(n, seed=seed, width=width, height=height)
            # Bare CP-SAT is told the height; the others find it by themselves.
            given = problem if contender is bare_cpsat else Problem(requests=problem.requests)
            runs.append({"seed": seed, **timed(contender, given, arguments.limit)})
        if not runs:
            continue
        solved = [run for run in runs if run["peak"] == height and run["seconds"] <= arguments.limit]
        times = sorted(run["seconds"] for run in solved)
        row = {
            "contender": name,
            "instances": f"planted {arguments.low} to {arguments.high}, box {width} x {height}",
            "limit_seconds": arguments.limit,
            "num_seeds": len(runs),
            "num_solved": len(solved),
            "seconds_median": times[len(times) // 2] if times else None,
            "seconds_max": times[-1] if times else None,
            "unsolved": [run for run in runs if run not in solved],
        }
        append_row("planted", row)
        print(name, row["num_solved"], "of", row["num_seeds"], row["seconds_median"], row["seconds_max"])


if __name__ == "__main__":
    main()
