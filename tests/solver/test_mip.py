import pytest

from memo_solver import Problem, Request, Status, solve
from memo_solver.errors import InputError
from memo_solver.instances import random_requests
from memo_solver.mip import solve_mip
from tests.solver.brute_force import optimum

pytest.importorskip("pulp")


@pytest.mark.parametrize("seed", range(6))
def test_the_published_program_reaches_the_optimum_of_tiny_problems(seed):
    problem = random_requests(6, seed=seed, horizon=8, max_size=5, max_alignment=4)
    solution = solve_mip(problem, time_limit_seconds=60)
    assert (solution.status, solution.peak) == (Status.OPTIMAL, optimum(problem))
    assert solve(problem).peak == solution.peak


def test_what_is_too_large_is_refused_before_it_is_built():
    many = tuple(Request(f"r{k}", 0, 1, 1) for k in range(800))
    with pytest.raises(InputError, match="conflicting pairs"):
        solve_mip(Problem(requests=many))
