"""``make_plan``: from a profile and settings to a plan within both budgets, or an error that helps.

The error plans what would fit instead, and the plan says what it assumes, which both take longer than to decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from memo_runtime.config import Settings
from memo_runtime.planning.infeasible import infeasible
from memo_runtime.planning.limits import Budgets
from memo_runtime.planning.notes import note_on_accumulation, note_on_pairs, note_on_stacks, notes_on
from memo_runtime.planning.policies import decide_somehow
from memo_runtime.planning.sheet import Sheet, in_proportion, lengths_of
from memo_runtime.planning.strategy import Decision
from memo_runtime.planning.tiles import floor
from memo_runtime.planning.words import PYTHON, PythonWords
from memo_runtime.records import Plan, Profile


def make_plan(
    profile: Profile,
    settings: Settings,
    *,
    tokens: Mapping[int, int] | None = None,
    longest: int | None = None,
    accumulating: bool = False,
    words: PythonWords = PYTHON,
) -> Plan:
    """Decide what happens to each byte of a training step. Pure: the same arguments give the same plan.

    Args:
        profile: what was measured. settings: policy and budgets.
        tokens: length of a sequence by stack index; stacks that are not named keep their profiled length.
        longest: of the longest sequence; the others are scaled as it is.
        accumulating: for steps that start with gradients already there.
        words: how a refusal puts what would fit.

    Raises:
        PlanRequestError: knobs that do not go with this profile.
        BlockFallbackError: ``strict`` and a block cannot take the policy.
        PlanInfeasibleError: the step does not fit in device memory. HostLimitError: nor in host memory.
    """
    lengths = lengths_of(profile, tokens)
    if longest is not None:
        lengths = in_proportion(lengths, longest)
    sheet = Sheet(profile, lengths, accumulating=accumulating)
    sheet, decision = decide_somehow(sheet, settings)
    if decision is None:
        raise infeasible(sheet, settings, words)
    plan = plan_of(sheet, settings, decision)
    # Lengths that a run has met come with a profile that knows them.
    if longest is None:
        return plan
    return replace(plan, notes=(*plan.notes, *note_on_stacks(sheet), *note_on_pairs(sheet)))


def plan_of(sheet: Sheet, settings: Settings, decision: Decision) -> Plan:
    """The plan that ``decision`` is, with what it says about itself."""
    return Plan(
        policy=settings.policy.value,
        alpha=settings.alpha,
        strict=settings.strict,
        profile=sheet.profile,
        limits=Budgets.of(sheet, settings).record(sheet.profile),
        blocks=sheet.plans(decision.choices),
        forecast=sheet.forecast(decision.choices),
        floor_bytes=sheet.peak_bytes(floor(sheet, settings)),
        accumulating=sheet.accumulating,
        norm_by_tiles=sheet.norm_by_tiles,
        seq_len=max(sheet.lengths, default=0),
        notes=(*decision.notes, *notes_on(sheet, decision.choices), *note_on_accumulation(sheet, settings)),
    )
