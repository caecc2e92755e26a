"""From settings to a strategy, and from a strategy to a decision."""

from __future__ import annotations

from memo_runtime.config import FIXED_ALPHA, Policy, Settings
from memo_runtime.planning.executors import EitherExecutor, chooses_executors
from memo_runtime.planning.freedom import AutoOnHost, FreeReplay
from memo_runtime.planning.limits import Budgets
from memo_runtime.planning.sheet import Sheet
from memo_runtime.planning.single_alpha import ClosedForm, FixedFraction, KeepAll
from memo_runtime.planning.strategy import Decision, Strategy
from memo_runtime.planning.tiles import ByTiles
from memo_runtime.planning.treatment import kept_blocks, refuse_fallbacks

_CPU_AUTO = (
    "auto plans as memo here: device and host are the same memory on cpu, so there is nothing to trade; "
    "give budget= to plan for a device of that size"
)


def decide(sheet: Sheet, settings: Settings) -> Decision | None:
    """What ``settings`` ask for, within their budgets; None if that is infeasible.

    Raises:
        PlanRequestError: knobs that do not go with this profile.
        BlockFallbackError: ``strict`` and a block cannot take the policy.
    """
    if settings.keep_last is not None:
        kept_blocks(sheet, settings.keep_last)
    budgets = Budgets.of(sheet, settings)
    strategy, notes = strategy_for(settings, budgets)
    decision = strategy.decide(sheet, budgets)
    if decision is None:
        return None
    refuse_fallbacks(sheet, decision.choices, settings)
    return Decision(decision.choices, (*notes, *decision.notes))


def decide_somehow(sheet: Sheet, settings: Settings) -> tuple[Sheet, Decision | None]:
    """``decide``, and what it is of: where nothing fits, ``sheet`` with the norm behind the blocks by tiles.

    As it is that norm takes several times the hidden state, and its results are the unwrapped model's to the bit.
    """
    decision = decide(sheet, settings)
    less = with_norm_by_tiles(sheet, settings) if decision is None else None
    return (sheet, decision) if less is None else (less, decide(less, settings))


def with_norm_by_tiles(sheet: Sheet, settings: Settings) -> Sheet | None:
    """``sheet`` so where that is a help and done: under policy 'none' nothing runs but the model."""
    return None if settings.policy is Policy.NONE else sheet.with_norm_by_tiles()


def strategy_for(settings: Settings, budgets: Budgets) -> tuple[Strategy, tuple[str, ...]]:
    """The strategy of ``settings``, and what a plan should say about that."""
    policy, keep_last = settings.policy, settings.keep_last
    limited = budgets.device is not None
    if policy is Policy.TILED:
        return ByTiles(settings.alpha, keep_last, settings.tile), ()
    if policy is Policy.NONE:
        return KeepAll(), ()
    alpha = FIXED_ALPHA.get(policy, settings.alpha)
    if alpha is not None:
        return FixedFraction(alpha, keep_last), ()
    if policy is Policy.MEMO:
        return ClosedForm(keep_last), ()
    if policy is Policy.AUTO and not limited:
        unfixed = keep_last is None
        return (AutoOnHost() if unfixed else ClosedForm(keep_last)), (_CPU_AUTO,)
    if chooses_executors(settings, budgets):
        return EitherExecutor(), ()
    return FreeReplay(keep_last, device_rows=limited), ()
