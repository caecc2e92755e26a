"""Plans by tiles in which only the first of so many blocks stashes its input."""

from __future__ import annotations

from dataclasses import replace

from memo_runtime.planning.chain import in_runs
from memo_runtime.planning.sheet import Choice, Sheet
from memo_runtime.records import Plan


def with_runs(plan: Plan, every: int, *, late: bool = False) -> Plan:
    """``plan`` with runs of ``every`` blocks, ``late`` ones."""
    sheet = Sheet(plan.profile, tuple(block.tokens for block in plan.blocks))
    choices = [
        Choice(one.executor, one.prefix, one.device_rows, one.reason, tile=one.tile, sent=one.sent, groups=one.groups)
        for one in plan.blocks
    ]
    linked = in_runs(plan.profile.blocks, choices, every, late=late)
    return replace(plan, blocks=sheet.plans(linked), forecast=sheet.forecast(linked))
