"""One unit below the peak load: refused with the requests that prove it, and how fast.

A job of benchmarks.solver.table.
"""

from __future__ import annotations

import time
from typing import Any

from memo_solver import Problem, SolveParams, Status, solve
from memo_solver.instances import loose_packing, planted_packing
from memo_solver.training import training_trace


def refused(num_seeds: int) -> dict[str, Any]:
    """Planted, thinned and traced instances, refused and the refusal added up."""
    problems = {f"planted 200, seed {seed}": planted_packing(200, seed=seed) for seed in range(num_seeds)}
    problems |= {f"thinned 300, seed {seed}": loose_packing(300, seed=seed) for seed in range(num_seeds)}
    problems["training trace 60000, seed 3"] = training_trace(60_000, seed=3)
    rows = []
    for name, problem in problems.items():
        # Where one request is as tall as the load, the capacity is refused as an input already.
        load = solve(Problem(requests=problem.requests), SolveParams(time_limit_seconds=0.1)).lower_bound
        if max(r.size for r in problem.requests) >= load:
            continue
        start = time.monotonic()
        solution = solve(Problem(requests=problem.requests, capacity=load - 1))
        seconds = time.monotonic() - start
        proof = solution.proof
        assert proof is not None
        names = set(proof.request_ids)
        alive = [r for r in problem.requests if r.id in names]
        proved = all(r.lower <= (proof.time or 0) < r.upper for r in alive)
        proved = proved and sum(r.size for r in alive) == proof.bound == load
        rows.append((name, seconds, solution.status is Status.INFEASIBLE and proved))
    slowest = max(rows, key=lambda row: row[1])
    return {
        "num_instances": len(rows),
        "num_refused_with_proof": sum(ok for _, _, ok in rows),
        "seconds_max": round(slowest[1], 3),
        "slowest": slowest[0],
    }
