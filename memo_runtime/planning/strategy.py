"""What a policy is to the planner.

A strategy offers *stand-bys*, plans that are worked out at once; a request is feasible if one of them fits both
budgets, so an error message can try many lengths and solve few programs. What the strategy then prefers (a closed
form, a linear program) is taken only if it fits too, and may fit where no stand-by does: a prefix between nothing
and everything can need less room for its rerun than the one and less host memory than the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memo_runtime.planning.limits import Budgets, fits
from memo_runtime.planning.sheet import Choice, Sheet

Choices = tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """What a strategy chose, and what the plan should say about it."""

    choices: Choices
    notes: tuple[str, ...] = ()


class Strategy(ABC):
    """One policy."""

    @abstractmethod
    def stand_bys(self, sheet: Sheet) -> Iterator[Choices]:
        """Plans that the policy may make, the preferred first."""

    def decide(self, sheet: Sheet, budgets: Budgets) -> Decision | None:
        """The best plan within ``budgets``, some plan wherever a stand-by fits; None if none is found."""
        choices = self.first_fitting(sheet, budgets)
        return None if choices is None else Decision(choices)

    def is_feasible(self, sheet: Sheet, budgets: Budgets) -> bool:
        """Whether ``decide`` finds a plan: at once where a stand-by fits."""
        return self.first_fitting(sheet, budgets) is not None or self.decide(sheet, budgets) is not None

    def first_fitting(self, sheet: Sheet, budgets: Budgets) -> Choices | None:
        """The first stand-by within ``budgets``."""
        return next((choices for choices in self.stand_bys(sheet) if fits(sheet, budgets, choices)), None)


def fastest(sheet: Sheet, budgets: Budgets, candidates: Sequence[Choices]) -> Choices | None:
    """The candidate within ``budgets`` with the shortest step; the first of equals."""
    fitting = [choices for choices in candidates if fits(sheet, budgets, choices)]
    return min(fitting, key=sheet.step_seconds, default=None)
