"""The linear program of the replay executor: which rows stay, which go to the host, which are rebuilt.

Per block three shares of its tokens that add up to one: ``device`` (kept), ``host`` (swapped), and the rest,
which is rebuilt. One rerun rebuilds all token-wise tensors of a block, so classes of tensors enter as byte
counts only.

    min   reruns + copies that compute cannot hide, each direction of the link on its own
    s.t.  device memory at every point of the step (the walk of ``forecast.run_course``)
          host memory in all

What jumps as soon as a prefix is not empty (landing buffers, copies under way, tensors with two token
dimensions) is constant in the program; blocks for which there is no room for that are taken out first, with
an empty prefix. The result is rounded down to whole granules and verified by exact bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

from memo_runtime.planning.forecast import compute_seconds, gradients_above, held_behind, put_off
from memo_runtime.planning.limits import Budgets, fits
from memo_runtime.planning.lines import Lines, lines_of
from memo_runtime.planning.program import PrefixProgram, least_of
from memo_runtime.planning.rounding import granule, round_prefix, whole_granules
from memo_runtime.planning.search import largest
from memo_runtime.planning.sheet import Choice, Sheet
from memo_runtime.records import Executor

_LOG = logging.getLogger("memo_runtime")

#: Rows by which the solver's answer may miss the whole number that was meant.
_ROW_TOLERANCE = 1e-3

#: Steps in which all prefixes are scaled down together if rounding broke a budget.
_REPAIR_STEPS = 256


def solve_prefixes(
    sheet: Sheet, budgets: Budgets, base: Sequence[Choice], *, device_rows: bool
) -> tuple[Choice, ...] | None:
    """The fastest prefixes for the blocks that ``base`` leaves at an empty one; None: no solution.

    Args:
        base: choices with an empty prefix wherever one may be chosen; all others are constants.
        device_rows: rows may also stay on the device.
    """
    free = {
        index for index, choice in enumerate(base) if choice == Choice(Executor.REPLAY) and _sliceable(sheet, index)
    }
    if free and not _pulp_is_installed():
        return None
    by_kind: dict[tuple[int, int], Lines] = {}
    for index in sorted(free):
        if sheet.kind(index) not in by_kind:
            by_kind[sheet.kind(index)] = lines_of(sheet, index)
    lines = {index: by_kind[sheet.kind(index)] for index in sorted(free)}
    best: tuple[Choice, ...] | None = None
    least_seconds = float("inf")
    tried: list[set[int]] = []
    for chosen in _line_ups(lines):
        open_blocks = _with_room(sheet, budgets, base, chosen)
        if set(open_blocks) in tried:
            continue
        tried.append(set(open_blocks))
        if not open_blocks or _bound(sheet, base, open_blocks) >= least_seconds:
            continue
        rows = PrefixProgram(sheet, budgets, base, open_blocks, device_rows).solve()
        choices = None if rows is None else _rounded(sheet, budgets, base, rows)
        if choices is not None and sheet.step_seconds(choices) < least_seconds:
            best, least_seconds = choices, sheet.step_seconds(choices)
    return best


def _bound(sheet: Sheet, base: Sequence[Choice], lines: dict[int, Lines]) -> float:
    """Seconds that no prefixes for the blocks of ``lines`` get below: theirs is no rerun, and every copy is hidden."""
    return compute_seconds(least_of(sheet, base, lines)) + sheet.around.outside_seconds


@cache
def _pulp_is_installed() -> bool:
    """Whether there is a solver at all; says once what follows if not."""
    installed = find_spec("pulp") is not None
    if not installed:
        _LOG.warning("PuLP is not installed (pip install pulp): a simpler plan is used than the linear program's")
    return installed


def _sliceable(sheet: Sheet, index: int) -> bool:
    tokens = sheet.lengths[index]
    return sheet.blocks[index].sliceable and tokens > granule(tokens) + 1


def _line_ups(lines: dict[int, Lines]) -> list[dict[int, Lines]]:
    """All blocks; where some copy much more as soon as they have a prefix, all but those; and the upper ones alone.

    What lands for a block without a prefix needs no room of its own, so that where there is little, a prefix for the
    upper blocks may buy more than one for all.
    """
    calm = {index: line for index, line in lines.items() if not line.jump}
    found = [lines] if len(calm) == len(lines) or not calm else [lines, calm]
    upper = list(lines.items())
    return found + [dict(upper[-count:]) for count in sorted({len(upper) // 2, 1} - {0, len(upper)}, reverse=True)]


def _with_room(sheet: Sheet, budgets: Budgets, base: Sequence[Choice], lines: dict[int, Lines]) -> dict[int, Lines]:
    """Those of ``lines`` for whose landing buffers and copies under way the device has room at any prefix."""
    left = dict(lines)
    if budgets.device is None:
        return left
    room = budgets.device - sheet.around.base_bytes
    while True:
        crowded = _crowding(sheet, base, left, room)
        if not crowded:
            return left
        for index in crowded:
            del left[index]


def _crowding(sheet: Sheet, base: Sequence[Choice], lines: dict[int, Lines], room: int) -> set[int]:
    """Blocks whose copies alone break the device budget somewhere, with everything else at its least."""
    transient = 1 if sheet.around.asynchronous else 0
    feet = least_of(sheet, base, lines)
    crowded: set[int] = set()
    kept = outgoing = 0
    for index, foot in enumerate(feet):
        at_end = foot.kept_rows + foot.gathered + transient * foot.end_peak if foot.stashed else 0
        if kept + outgoing + foot.skeletal + max(transient * foot.forward_peak, at_end) > room:
            crowded.add(index - 1)
        outgoing = foot.outgoing if sheet.around.asynchronous else 0
        kept += foot.kept
    kept = landing = 0
    lower = -1
    there = gradients_above(sheet.around, feet)
    for index, foot in enumerate(feet):
        kept += foot.kept
        behind = held_behind(sheet.around, foot, last=index == len(feet) - 1)
        peak = transient * max(foot.rerun_peak + sheet.around.result, foot.backward_peak + behind - foot.spent)
        arriving = 0 if put_off(foot, landing) else landing
        if kept + foot.full + arriving + peak + there[index] > room:
            crowded.add(lower)
        if foot.copies:
            landing, lower = foot.landing, index
    return crowded & set(lines)


def _rounded(
    sheet: Sheet, budgets: Budgets, base: Sequence[Choice], rows: dict[int, tuple[float, float]]
) -> tuple[Choice, ...] | None:
    """``rows`` in whole granules, scaled down together where exact bytes break a budget all the same."""

    def scaled(steps: int) -> tuple[Choice, ...]:
        share = steps / _REPAIR_STEPS
        return tuple(
            _choice(sheet.lengths[index], *(share * row for row in rows[index])) if index in rows else choice
            for index, choice in enumerate(base)
        )

    choices = scaled(_REPAIR_STEPS)
    if fits(sheet, budgets, choices):
        return choices
    choices = scaled(largest(lambda steps: fits(sheet, budgets, scaled(steps)), _REPAIR_STEPS))
    return choices if fits(sheet, budgets, choices) else None


def _choice(tokens: int, prefix_rows: float, device_rows: float) -> Choice:
    prefix = round_prefix(prefix_rows + _ROW_TOLERANCE, tokens)
    device = tokens if device_rows >= tokens - _ROW_TOLERANCE else whole_granules(device_rows + _ROW_TOLERANCE, tokens)
    return Choice(Executor.REPLAY, prefix, min(device, prefix))
