import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memo_solver import Problem, Request, validate
from memo_solver.errors import InvalidPlacementError
from memo_solver.validator import Rule, find_violation
from tests.solver.brute_force import overlaps
from tests.solver.problems import problems

TWO = Problem(requests=(Request("a", 0, 4, 3), Request("b", 2, 6, 3, 2)), capacity=8)


@pytest.mark.parametrize(
    ("offsets", "rule"),
    [
        ((0, 4), None),
        ((5, 0), None),
        ((0,), Rule.COUNT),
        ((-1, 4), Rule.NEGATIVE),
        ((0, 3), Rule.ALIGNMENT),
        ((0, 2), Rule.OVERLAP),
        ((6, 0), Rule.CAPACITY),
    ],
)
def test_each_rule_is_found_and_named(offsets, rule):
    violation = find_violation(TWO, offsets)
    assert (violation and violation.rule) == rule
    if rule is not None:
        with pytest.raises(InvalidPlacementError, match="broken rule"):
            validate(TWO, offsets)


def test_lifetimes_are_half_open():
    problem = Problem(requests=(Request("a", 0, 4, 3), Request("b", 4, 6, 3)))
    assert find_violation(problem, (0, 0)) is None


@settings(max_examples=400, deadline=None)
@given(problems(max_requests=9), st.data())
def test_the_sweep_agrees_with_all_pairs(problem, data):
    offsets = [data.draw(st.integers(0, 12)) for _ in problem.requests]
    violation = find_violation(problem, offsets)
    assert (violation is not None) == overlaps(problem, offsets)
