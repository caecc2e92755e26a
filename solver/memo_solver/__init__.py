"""Offline placement of bytes: dynamic storage allocation with a bound on every answer.

    from memo_solver import Problem, Request, solve

    problem = Problem(requests=(Request("a", 0, 4, 3), Request("b", 2, 6, 3)))
    solution = solve(problem)
    solution.status, solution.peak, solution.lower_bound, solution.placement.by_id()

This package never imports torch; OR-Tools and PuLP are imported only when used.
"""

from memo_solver.bilevel import solve_bilevel
from memo_solver.engine import solve
from memo_solver.native import native_status
from memo_solver.params import SolveParams
from memo_solver.reading import read_placement, read_problem
from memo_solver.records import Placement, Problem, Request, Solution, Status
from memo_solver.validator import validate
from memo_solver.writing import write_placement

__all__ = [
    "Placement",
    "Problem",
    "Request",
    "Solution",
    "SolveParams",
    "Status",
    "native_status",
    "read_placement",
    "read_problem",
    "solve",
    "solve_bilevel",
    "validate",
    "write_placement",
]
