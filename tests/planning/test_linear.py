"""Expressions are what they are written as."""

import pytest

from memo_runtime.planning.linear import Linear, LinearProgram, total

VALUES = [3.0, 5.0]


def variables():
    program = LinearProgram()
    return program.variable("x"), program.variable("y", 1)


@pytest.mark.parametrize(
    "written",
    [
        lambda x, y: x + y,
        lambda x, y: 1 - x,
        lambda x, y: x - 1,
        lambda x, y: 2 * x - y * 3 + 7,
        lambda x, y: 4 * (1 - (x + y)) + 0.5,
        lambda x, y: x - x + y,
        lambda x, y: 5 + (x - 2 * (x - y)),
        lambda x, y: total([x, 1, y, 2.5, x]) if isinstance(x, Linear) else 2 * x + 3.5 + y,
    ],
)
def test_they_have_the_value_of_the_same_with_numbers(written):
    found = written(*variables())
    assert found.at(VALUES) == written(*VALUES)


def test_making_one_from_another_leaves_that_as_it_was():
    x, y = variables()
    _ = x + y, x - y, 3 * x, x + 1, total([x, y, x])
    assert (x.constant, x.terms, y.terms) == (0.0, {0: 1.0}, {1: 1.0})


def test_nothing_of_something_is_nothing():
    x, _ = variables()
    assert (0 * (x + 1)).terms == {}
    assert (0 * (x + 1)).constant == 0
