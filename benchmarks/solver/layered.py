"""A layered step of 80 blocks, bi-level, and MEMO's MIP on the same level-1 problems.

    python -m benchmarks.solver.layered --limit 5 --mip-limit 60
"""

from __future__ import annotations

import argparse
import time

from benchmarks.solver.provenance import append_row
from memo_solver import Problem, SolveParams, solve, solve_bilevel
from memo_solver.errors import InputError
from memo_solver.mip import solve_mip
from memo_solver.training import layered_step


def bilevel(num_requests: int, seed: int, num_wrapping: int, limit: float) -> None:
    """One step, bi-level, with the time of the whole call."""
    blocks, iteration = layered_step(num_requests, seed=seed, num_wrapping=num_wrapping)
    start = time.monotonic()
    result = solve_bilevel(blocks, iteration, SolveParams(time_limit_seconds=limit))
    seconds = time.monotonic() - start
    solution = result.solution
    assert solution.peak is not None
    row = {
        "contender": "memo_solver bi-level",
        "instance": f"80 layers, seed {seed}, {num_wrapping} wrapping",
        "num_requests": 0 if solution.placement is None else len(solution.placement.offsets),
        "limit_seconds": limit,
        "seconds": round(seconds, 3),
        "peak": solution.peak,
        "lower_bound": solution.lower_bound,
        "ratio": solution.peak / solution.lower_bound,
        "flat_heuristic_ratio": result.flat_peak / solution.lower_bound,
        "rectangle_ratio": result.rectangle_peak / solution.lower_bound,
        "stages": [[s.name, round(s.seconds, 3), s.peak, s.note] for s in solution.stages],
    }
    append_row("layered", row)
    shown = ("instance", "num_requests", "ratio", "flat_heuristic_ratio", "rectangle_ratio", "seconds")
    print(*(row[name] for name in shown), flush=True)


def level1(num_requests: int, seed: int, limit: float) -> None:
    """The distinct blocks of a step: this solver and the published program on each."""
    blocks, _ = layered_step(num_requests, seed=seed)
    for block in (blocks[0], blocks[1]):
        problem = Problem(requests=block.requests)
        start = time.monotonic()
        ours = solve(problem, SolveParams(time_limit_seconds=limit))
        ours_seconds = time.monotonic() - start
        start = time.monotonic()
        try:
            published = solve_mip(problem, time_limit_seconds=limit)
            answer = {"mip_peak": published.peak, "mip_status": published.status.value}
        except InputError as error:
            answer = {"mip_peak": None, "mip_status": str(error)}
        row = {
            "contender": "level 1",
            "instance": f"block {block.id} of seed {seed}",
            "num_requests": len(problem.requests),
            "limit_seconds": limit,
            "lower_bound": ours.lower_bound,
            "memo_solver_peak": ours.peak,
            "memo_solver_status": ours.status.value,
            "memo_solver_seconds": round(ours_seconds, 3),
            "mip_seconds": round(time.monotonic() - start, 3),
            **answer,
        }
        append_row("layered", row)
        print({k: v for k, v in row.items() if k != "provenance"}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=4.5)
    parser.add_argument("--mip-limit", type=float, default=60.0)
    parser.add_argument("--requests", type=int, default=52_000)
    arguments = parser.parse_args()
    for seed, num_wrapping in ((1, 0), (2, 0), (3, 0), (1, 20)):
        bilevel(arguments.requests, seed, num_wrapping, arguments.limit)
    if arguments.mip_limit > 0:
        level1(arguments.requests, 1, arguments.mip_limit)
        level1(3_000, 2, arguments.mip_limit)


if __name__ == "__main__":
    main()
