import pytest

from memo_solver import SolveParams, solve
from memo_solver.errors import MemoSolverError
from memo_solver.params import Switch
from memo_solver.reading import parse
from tests.solver.mutations import mutated

QUICK = SolveParams(time_limit_seconds=0.2, exact=Switch.OFF, num_threads=1)


def run(first, last):
    """Parse (and now and then solve) mutated files; returns how many were read and how many refused."""
    num_read = num_refused = 0
    for number in range(first, last):
        path, data = mutated(number)
        try:
            loaded = parse(data, path=path)
        except MemoSolverError as error:
            num_refused += path in str(error)
        else:
            num_read += 1
            if number % 50 == 0:
                solve(loaded.problem, QUICK)
    return num_read, num_refused


def test_mutated_files_give_an_error_or_an_answer():
    num_read, num_refused = run(0, 4_000)
    assert num_read > 100
    assert num_refused > 1000


@pytest.mark.slow
def test_a_hundred_thousand_mutated_files():
    num_read, num_refused = run(0, 100_000)
    assert num_read + num_refused == 100_000
