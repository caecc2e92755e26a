"""A layered step of 80 blocks, bi-level, and MEMO's MIP on the same level-1 problems.

Jobs of benchmarks.solver.table.
"""

from __future__ import annotations

import time
from typing import Any

from memo_solver import Problem, SolveParams, solve, solve_bilevel
from memo_solver.errors import InputError
from memo_solver.mip import solve_mip
from memo_solver.training import layered_step


def bilevel(num_requests: int, seed: int, num_wrapping: int, limit: float) -> dict[str, Any]:
    """One step, bi-level, with the time of the whole call."""
    blocks, iteration = layered_step(num_requests, seed=seed, num_wrapping=num_wrapping)
    start = time.monotonic()
    result = solve_bilevel(blocks, iteration, SolveParams(time_limit_seconds=limit))
    seconds = time.monotonic() - start
    solution = result.solution
    assert solution.peak is not None
    assert result.rectangle_peak is not None
    return {
        "num_requests": 0 if solution.placement is None else len(solution.placement.offsets),
        "seconds": round(seconds, 3),
        "peak": solution.peak,
        "lower_bound": solution.lower_bound,
        "ratio": solution.peak / solution.lower_bound,
        "flat_heuristic_ratio": result.flat_peak / solution.lower_bound,
        "rectangle_ratio": result.rectangle_peak / solution.lower_bound,
        "stages": [[s.name, round(s.seconds, 3), s.peak, s.note] for s in solution.stages],
    }


def level1(num_requests: int, seed: int, number: int, limit: float) -> dict[str, Any]:
    """A distinct block of a step (0 = forward, 1 = backward): this solver and the published program on it."""
    blocks, _ = layered_step(num_requests, seed=seed)
    problem = Problem(requests=blocks[number].requests)
    start = time.monotonic()
    ours = solve(problem, SolveParams(time_limit_seconds=limit))
    ours_seconds = time.monotonic() - start
    start = time.monotonic()
    try:
        published = solve_mip(problem, time_limit_seconds=limit)
        answer = {"mip_peak": published.peak, "mip_status": published.status.value}
    except InputError as error:
        answer = {"mip_peak": None, "mip_status": str(error)}
    return {
        "num_requests": len(problem.requests),
        "lower_bound": ours.lower_bound,
        "memo_solver_peak": ours.peak,
        "memo_solver_status": ours.status.value,
        "memo_solver_seconds": round(ours_seconds, 3),
        "mip_seconds": round(time.monotonic() - start, 3),
        **answer,
    }
