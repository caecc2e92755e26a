"""From a model's name to a plan for a machine that is not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from memo_runtime.blocks.squares import what_squares_take
from memo_runtime.config import Policy, Settings
from memo_runtime.machines.machine import Machine
from memo_runtime.offline.iteration import iteration_trace
from memo_runtime.offline.optimizers import Optimizer
from memo_runtime.offline.profile import Offline, profile_offline
from memo_runtime.offline.subject import Subject
from memo_runtime.planning.executors import chooses_executors, tiles_are_worth_trying
from memo_runtime.planning.infeasible import infeasible
from memo_runtime.planning.layout import Layout, plan_layout
from memo_runtime.planning.limits import Budgets
from memo_runtime.planning.planner import plan_of
from memo_runtime.planning.policies import decide_somehow
from memo_runtime.planning.sheet import Sheet, lengths_of
from memo_runtime.planning.strategy import Decision
from memo_runtime.planning.suggest import is_feasible
from memo_runtime.planning.words import CommandWords
from memo_runtime.records import Plan
from memo_runtime.reporting.mfu import utilization
from memo_runtime.units import format_bytes

#: Limit of the layout's solver.
_LAYOUT_SECONDS = 8.0


def plan_offline(
    subject: Subject,
    machine: Machine,
    settings: Settings,
    *,
    tokens: int,
    gpus: int = 1,
    host_bytes: int | None = None,
    optimizer: Optimizer | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Plan:
    """A plan for one rank of ``gpus`` on ``tokens`` tokens of one sequence.

    Args:
        settings: policy and budgets of one GPU. host_bytes: of the whole node, divided by GPUs.
        optimizer: None: AdamW is assumed. progress: told what is done next.

    Raises:
        PlanInfeasibleError: nothing fits; says by how much, and what would.
        See also ``profile_offline`` and ``make_plan``.
    """
    offline = profile_offline(
        subject, machine, tokens=tokens, gpus=gpus, host_bytes=host_bytes, optimizer=optimizer, progress=progress
    )
    progress("the plan")
    plan = plan_at(offline, settings)
    progress("the layout")
    return with_placement(plan, offline)


def plan_at(offline: Offline, settings: Settings) -> Plan:
    """The plan of ``settings`` for one rank, without addresses.

    As in a run, ``auto`` goes by tiles only where that is worth their preparation.

    Raises:
        PlanInfeasibleError: nothing fits; says by how much, and what would.
    """
    decided = _decided_at(offline, settings)
    return finished(plan_of(decided.sheet, settings, decided.decision), offline)


def seconds_at(offline: Offline, settings: Settings) -> float:
    """Step time of ``plan_at``, which raises likewise."""
    decided = _decided_at(offline, settings)
    return decided.sheet.step_seconds(decided.decision.choices)


@dataclass(frozen=True, slots=True)
class _Decided:
    sheet: Sheet
    decision: Decision


def _decided_at(offline: Offline, settings: Settings) -> _Decided:
    """See ``plan_at``. Of blocks that may run by tiles an error says what they need so, too."""
    words = CommandWords(offline.study.ranks.gpus)
    if settings.policy is not Policy.TILED:
        sheet, decision = decide_somehow(_sheet(offline), settings)
        if decision is None and not chooses_executors(settings, Budgets.of(sheet, settings)):
            raise infeasible(sheet, settings, words)
        seconds = None if decision is None else sheet.step_seconds(decision.choices)
        if decision is not None and not tiles_are_worth_trying(sheet, settings, seconds):
            return _Decided(sheet, decision)
    sheet, decision = decide_somehow(_sheet(offline.with_tiles()), settings)
    if decision is None:
        raise infeasible(sheet, settings, words)
    return _Decided(sheet, decision)


def is_feasible_at(offline: Offline, settings: Settings) -> bool:
    """Whether ``plan_at`` finds one."""
    if settings.policy is not Policy.TILED:
        sheet = _sheet(offline)
        found = is_feasible(sheet, settings)
        if found or not tiles_are_worth_trying(sheet, settings, None):
            return found
    return is_feasible(_sheet(offline.with_tiles()), settings)


def _sheet(offline: Offline) -> Sheet:
    return Sheet(offline.profile, lengths_of(offline.profile, None))


def with_placement(plan: Plan, offline: Offline) -> Plan:
    """``plan`` with an address for everything that a step of it allocates and frees."""
    trace, names = iteration_trace(plan, offline.runs())
    layout = plan_layout(trace, seconds=_LAYOUT_SECONDS)
    rows = tuple(replace(row, id=names[index]) for index, row in zip(layout.placed, layout.rows, strict=True))
    distinct = sum(arena.num_distinct for arena in layout.arenas)
    note = (
        f"layout: {len(rows):,} requests in an arena of {format_bytes(layout.peak)}, {_over(layout)} above the most "
        f"that is alive at once; {distinct} different forwards and backwards of blocks placed once each"
    )
    return replace(plan, placement=rows, notes=(*plan.notes, note))


def _over(layout: Layout) -> str:
    return f"{100 * (layout.peak / max(1, layout.lower_bound) - 1):.2f} %"


def finished(plan: Plan, offline: Offline) -> Plan:
    """``plan`` with what concerns all GPUs together."""
    seconds, gpus = plan.forecast.step_seconds, offline.study.ranks.gpus
    used = utilization(offline.model_flops, seconds, plan.profile.device_name, devices=gpus)
    forecast = replace(
        plan.forecast,
        mfu=used or 0.0,
        collective_bytes=offline.sent_bytes,
        collective_seconds=offline.sent_seconds,
    )
    tokens = offline.study.ranks.local(offline.tokens)  # of one GPU, as everything else in the plan
    of_pairs = round(offline.profile.shared.quadratic * tokens**2)
    about = what_squares_take("masks or biases for all pairs of tokens take", of_pairs, tokens)
    notes = (*plan.notes, about) if about is not None else plan.notes
    return replace(plan, forecast=forecast, seq_len=offline.tokens, gpus=gpus, notes=notes)
