"""Programs as files: PuLP reads what is written for its solver, and solves it to the same values."""

import random
import warnings

import pytest

from memo_runtime.planning.cbc import _mps, solve
from memo_runtime.planning.linear import LinearProgram, Sense


def some_program(seed):
    """Up to 12 variables and a feasible point, with a best answer since everything is bounded."""
    drawn = random.Random(seed)
    program = LinearProgram()
    many = [program.variable(f"v_{number}", drawn.choice([0, 1, 2.5, 10])) for number in range(drawn.randint(1, 12))]
    point = [drawn.uniform(0, most) for _, most in program.variables]
    for _ in range(drawn.randint(0, 15)):
        row = drawn.uniform(-5, 5) + sum(drawn.choice([0, 0, 1, -2.25, 1e-7]) * one for one in many)
        room = row.at(point)
        sense = drawn.choice(list(Sense))
        slack = {Sense.AT_MOST: -1, Sense.AT_LEAST: 1, Sense.EQUAL: 0}[sense] * drawn.choice([0, 1])
        program.hold(row - room + slack, sense)
    program.objective = sum(drawn.uniform(-1, 1) * one for one in many)
    return program, point


def by_pulp(program, folder):
    """(status, best objective) of the file of ``program``, read and solved by PuLP."""
    pulp = pytest.importorskip("pulp")
    order = sorted(range(len(program.variables)), key=lambda number: program.variables[number][0])
    path = folder / "program.mps"
    path.write_text("".join(_mps(program, order)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        _, problem = pulp.LpProblem.fromMPS(str(path))
        status = problem.solve(pulp.PULP_CBC_CMD(msg=False))
    return pulp.LpStatus[status], pulp.value(problem.objective) or 0.0


@pytest.mark.parametrize("seed", range(20))
def test_pulp_reads_the_file_and_finds_as_good_an_answer(seed, tmp_path):
    program, point = some_program(seed)
    values = solve(program)
    assert values is not None
    assert by_pulp(program, tmp_path) == ("Optimal", pytest.approx(program.objective.at(values), abs=1e-6))
    assert program.objective.at(values) <= program.objective.at(point) + 1e-6
    for value, (_, most) in zip(values, program.variables, strict=True):
        assert -1e-6 <= value <= most + 1e-6
    for row, sense in program.rows:
        if sense is not Sense.AT_LEAST:
            assert row.at(values) <= 1e-6
        if sense is not Sense.AT_MOST:
            assert row.at(values) >= -1e-6


def test_values_come_in_the_order_of_the_variables_and_not_of_their_names():
    program = LinearProgram()
    for number in (10, 9, 1):
        program.hold(program.variable(f"v_{number}", 20) - number, Sense.EQUAL)
    assert solve(program) == [10, 9, 1]


def test_what_has_no_answer_has_none():
    program = LinearProgram()
    program.hold(program.variable("v", 1) - 2, Sense.AT_LEAST)
    assert solve(program) is None
    program = LinearProgram()
    program.objective = -1 * program.variable("v")
    program.hold(program.objective, Sense.AT_MOST)
    assert solve(program) is None
