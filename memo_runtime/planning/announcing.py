"""What is said of a plan when a step begins to run under it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from memo_runtime.config import Policy
from memo_runtime.records import Plan
from memo_runtime.units import format_bytes, format_seconds

logger = logging.getLogger("memo_runtime")


def announce(plan: Plan, note: Callable[[str], None]) -> None:
    """Log what ``plan`` will take, and ``note`` why blocks run in another way than its policy's."""
    forecast = plan.forecast
    counts = Counter(block.executor.value for block in plan.blocks)
    logger.info(
        "memo: %s; step %s, peak %s, host %s, to host %s, recomputed %.3g FLOP",
        ", ".join(f"{count} x {name}" for name, count in counts.items()),
        format_seconds(forecast.step_seconds),
        format_bytes(forecast.peak_bytes),
        format_bytes(forecast.host_bytes),
        format_bytes(forecast.bytes_to_host),
        forecast.recomputed_flops,
    )
    reasons: dict[str, list[str]] = {}
    tiles = {block.tiled_reason for block in plan.profile.blocks} if plan.policy == Policy.AUTO else set()
    for block in plan.blocks:
        # That a block cannot run by tiles is a note of an auto plan already.
        if block.reason and block.reason not in tiles:
            reasons.setdefault(block.reason, []).append(block.name)
    for reason, names in reasons.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        note(f"'{names[0]}'{others} cannot take policy '{plan.policy}': {reason}")
