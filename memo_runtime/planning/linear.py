"""Linear programs in plain numbers.

Making, adding and scaling PuLP's objects took three times as long as what its solver then does, so that expressions are
dictionaries by the number of a variable, and the solver is given its own kind of file (``cbc.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Sense(StrEnum):
    """How a row compares to 0; the values are those of MPS files."""

    AT_MOST = "L"
    AT_LEAST = "G"
    EQUAL = "E"


class Linear:
    """A constant and a multiple of each variable. Values: operators make new ones."""

    __slots__ = ("constant", "terms")

    def __init__(self, constant: float = 0.0, terms: dict[int, float] | None = None) -> None:
        self.constant = constant
        self.terms = {} if terms is None else terms

    def at(self, values: Sequence[float]) -> float:
        """Where the variables have these ``values``."""
        return self.constant + sum(factor * values[number] for number, factor in self.terms.items())

    def __add__(self, other: Linear | float) -> Linear:
        if not isinstance(other, Linear):
            return Linear(self.constant + other, self.terms)
        return Linear(self.constant + other.constant, _sum(self.terms, other.terms))

    def __sub__(self, other: Linear | float) -> Linear:
        return self + -1 * other

    def __rsub__(self, other: float) -> Linear:
        return -1 * self + other

    def __mul__(self, factor: float) -> Linear:
        if factor == 0:
            return Linear()
        return Linear(self.constant * factor, {number: factor * one for number, one in self.terms.items()})

    __radd__ = __add__
    __rmul__ = __mul__


def _sum(first: dict[int, float], second: dict[int, float]) -> dict[int, float]:
    if not first or not second:
        return first or second
    found = dict(first)
    for number, one in second.items():
        found[number] = found[number] + one if number in found else one
    return found


def total(some: Iterable[Linear | float]) -> Linear:
    """The sum of ``some``."""
    constant: float = 0.0
    terms: dict[int, float] = {}
    for one in some:
        if not isinstance(one, Linear):
            constant += one
            continue
        constant += one.constant
        for number, factor in one.terms.items():
            terms[number] = terms[number] + factor if number in terms else factor
    return Linear(constant, terms)


@dataclass(slots=True)
class LinearProgram:
    """Variables of at least 0, rows, and what is to be as little as possible.

    Attributes:
        variables: (name, most) of each; a most of None: there is none. rows: (expression, what it is compared to 0 by).
    """

    objective: Linear = field(default_factory=Linear)
    variables: list[tuple[str, float | None]] = field(init=False, default_factory=list)
    rows: list[tuple[Linear, Sense]] = field(init=False, default_factory=list)

    def variable(self, name: str, most: float | None = None) -> Linear:
        """A new one."""
        self.variables.append((name, most))
        return Linear(0.0, {len(self.variables) - 1: 1.0})

    def hold(self, expression: Linear, sense: Sense) -> None:
        """A new row."""
        self.rows.append((expression, sense))
