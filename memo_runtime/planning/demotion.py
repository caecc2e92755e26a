"""Planning again after a step has shown that a block cannot be run again as its profile says.

The profile is corrected and the same request is planned anew within the same budgets. A plan that was given keeps
everything but the blocks concerned: what it was made from is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from memo_runtime.config import Settings
from memo_runtime.errors import PlanInfeasibleError
from memo_runtime.planning.chain import still_linked
from memo_runtime.planning.limits import Budgets, fits
from memo_runtime.planning.planner import make_plan
from memo_runtime.planning.sheet import Choice, Sheet
from memo_runtime.planning.treatment import at_prefix
from memo_runtime.records import BlockPlan, BlockProfile, Demotion, Executor, Plan, Profile
from memo_runtime.units import format_bytes

_RERUN = (Executor.REPLAY, Executor.RECOMPUTE)


def corrected(profile: Profile, demotions: Mapping[str, Demotion]) -> Profile:
    """``profile`` with what was found out about its blocks, by name."""
    if not demotions.keys() & {block.name for block in profile.blocks}:
        return profile
    blocks = (
        _demoted(block, found)
        if (found := demotions.get(block.name)) is not None
        else block
        for block in profile.blocks
    )
    return replace(profile, blocks=tuple(blocks))


def _demoted(block: BlockProfile, found: Demotion) -> BlockProfile:
    if found.unchained:
        return block if block.tiled is None else replace(block, tiled=replace(block.tiled, chained=False))
    if found.tiles_only:
        return replace(block, tiled=None, tiled_reason=found.reason)
    return replace(block, sliceable=False, replayable=False, rerunnable=found.rerunnable, reason=found.reason)


def plan_with(
    profile: Profile,
    settings: Settings,
    demotions: Mapping[str, Demotion],
    *,
    tokens: Mapping[int, int] | None = None,
    accumulating: bool = False,
) -> Plan:
    """``make_plan`` from the corrected profile.

    Raises:
        PlanRequestError, BlockFallbackError, PlanInfeasibleError, HostLimitError: as ``make_plan``; where it no
            longer fits, the error names the blocks that it no longer fits with.
    """
    right = corrected(profile, demotions)
    if right is profile:
        return make_plan(profile, settings, tokens=tokens, accumulating=accumulating)
    try:
        return make_plan(right, settings, tokens=tokens, accumulating=accumulating)
    except PlanInfeasibleError as error:
        raise type(error)(f"{error}\n{_since(demotions)}") from error


def amended(plan: Plan, demotions: Mapping[str, Demotion], *, accumulating: bool = False) -> Plan:
    """A given plan in which only the blocks of ``demotions`` run in another way, within the plan's own limits.

    ``accumulating``: the step starts with gradients, which the plan may not have reckoned with.

    Raises:
        PlanInfeasibleError: that does not fit.
    """
    profile = corrected(plan.profile, demotions)
    accumulating = accumulating or plan.accumulating
    if profile is plan.profile and accumulating == plan.accumulating:
        return plan
    lengths = tuple(block.tokens for block in plan.blocks)
    sheet = Sheet(profile, lengths, accumulating=accumulating, norm_by_tiles=plan.norm_by_tiles)
    choices = tuple(
        _instead(block, planned) if _concerned(planned, demotions) else _choice(planned)
        for block, planned in zip(profile.blocks, plan.blocks, strict=True)
    )
    choices = still_linked(profile.blocks, choices)
    budgets = Budgets.recorded(plan.limits)
    if not fits(sheet, budgets, choices):
        since = _since(demotions, accumulating=accumulating and not plan.accumulating)
        device, host = sheet.peak_bytes(choices), sheet.host_bytes(choices)
        raise PlanInfeasibleError(
            f"the given plan no longer fits its own limits: it needs {format_bytes(device)} on the device "
            f"({format_bytes(plan.limits.device_bytes)}, {plan.limits.device_source}) and {format_bytes(host)} of "
            f"host memory ({format_bytes(budgets.host)}, {budgets.host_source})\n{since}\n"
            "  would work: leave plan= out and give budgets, or plan again with a larger budget"
        )
    return replace(
        plan,
        profile=profile,
        blocks=sheet.plans(choices),
        forecast=sheet.forecast(choices),
        accumulating=accumulating,
    )


def _concerned(planned: BlockPlan, demotions: Mapping[str, Demotion]) -> bool:
    found = demotions.get(planned.name)
    if found is None or found.unchained:
        return False
    return planned.executor is Executor.TILED if found.tiles_only else planned.executor in _RERUN


def _instead(block: BlockProfile, planned: BlockPlan) -> Choice:
    if planned.executor is Executor.TILED:
        return replace(at_prefix(block, 0, planned.tokens), reason=block.tiled_reason)
    return at_prefix(block, planned.prefix, planned.tokens)


def _choice(planned: BlockPlan) -> Choice:
    if planned.executor in (Executor.REPLAY, Executor.TILED):
        return Choice(
            planned.executor,
            planned.prefix,
            planned.device_rows,
            planned.reason,
            tile=planned.tile,
            resident=planned.resident,
            sent=planned.sent,
            groups=planned.groups,
            from_below=planned.from_below,
            for_above=planned.for_above,
            late=planned.late,
            passes=planned.passes,
            mixer_inputs=planned.mixer_inputs,
        )
    return Choice(planned.executor, reason=planned.reason)


def _since(demotions: Mapping[str, Demotion], *, accumulating: bool = False) -> str:
    reasons: dict[str, list[str]] = {}
    for name, demotion in demotions.items():
        reasons.setdefault(demotion.reason, []).append(name)
    lines = [
        f"  since      '{names[0]}'{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in reasons.items()
    ]
    if accumulating:
        lines.append(
            "  since      the step starts with gradients, which the plan takes to come in backward: "
            "zero_grad(set_to_none=True) before each forward"
        )
    return "\n".join(lines)
