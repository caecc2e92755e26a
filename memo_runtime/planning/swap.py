"""The linear program of the replay executor: which rows stay, which go to the host, which are rebuilt.

Per block three shares of its tokens that add up to one: ``device`` (kept), ``host`` (swapped), and the rest,
which is rebuilt. One rerun rebuilds all token-wise tensors of a block, so classes of tensors enter as byte
counts only.

    min   reruns + copies that compute cannot hide, each direction of the link on its own
    s.t.  device memory at every point of the step (the walk of ``forecast.run_course``)
          host memory in all

What jumps as soon as a prefix is not empty (landing buffers, copies under way, tensors with two token
dimensions) is constant in the program; blocks for which there is no room for that are taken out first, with
an empty prefix. The result is rounded to whole granules and verified by exact bytes: down where that fits, else so
that no block has more in either memory than was meant. What fits less memory or a longer sequence fits more memory and
a shorter one, which errors and bisections rely on; lengths of few granules may miss it by one in each block.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import islice

from memo_runtime.planning.forecast import compute_seconds, gradients_above, held_behind, put_off
from memo_runtime.planning.limits import Budgets, fits
from memo_runtime.planning.lines import Lines, lines_of
from memo_runtime.planning.program import PrefixProgram, least_of
from memo_runtime.planning.rounding import granule, round_prefix, whole_granules
from memo_runtime.planning.sheet import Choice, Sheet
from memo_runtime.records import Executor

_LOG = logging.getLogger("memo_runtime")

#: Rows by which the solver's answer may miss the whole number that was meant.
_ROW_TOLERANCE = 1e-3


def solve_prefixes(
    sheet: Sheet, budgets: Budgets, base: Sequence[Choice], *, device_rows: bool, thorough: bool = True
) -> tuple[Choice, ...] | None:
    """The fastest prefixes for the blocks that ``base`` leaves at an empty one; None: no solution.

    Args:
        base: choices with an empty prefix wherever one may be chosen; all others are constants.
        device_rows: rows may also stay on the device.
        thorough: where nothing is found, prefixes for fewer and fewer blocks are tried.
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

    def with_room() -> Iterator[dict[int, Lines]]:
        for chosen in _line_ups(lines):
            yield _with_room(sheet, budgets, base, chosen)
        if thorough and best is None:
            # What fits a smaller device fits this one.
            yield from islice(_with_less_and_less(sheet, budgets, base, lines), 1, None)

    for open_blocks in with_room():
        if set(open_blocks) in tried:
            continue
        tried.append(set(open_blocks))
        if not open_blocks or _bound(sheet, base, open_blocks) >= least_seconds:
            continue
        choices = _solved(sheet, budgets, base, open_blocks, device_rows=device_rows)
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
    return next(_with_less_and_less(sheet, budgets, base, lines))


def _with_less_and_less(
    sheet: Sheet, budgets: Budgets, base: Sequence[Choice], lines: dict[int, Lines]
) -> Iterator[dict[int, Lines]]:
    """Those of ``lines`` for which the device has room, and those for which a smaller and smaller one would have."""
    left = dict(lines)
    if budgets.device is None:
        yield left
        return
    room = budgets.device - sheet.around.base_bytes
    while True:
        takes = _takes_at_least(sheet, base, left)
        if not takes:
            yield {}
            return
        most = max(takes.values())
        if most <= room:
            yield dict(left)
            room = most - 1
        for index, least in takes.items():
            if least > room:
                del left[index]


def _takes_at_least(sheet: Sheet, base: Sequence[Choice], lines: dict[int, Lines]) -> dict[int, int]:
    """Most bytes beside which copies of each block of ``lines`` have to be, with everything else at its least."""
    transient = 1 if sheet.around.asynchronous else 0
    feet = least_of(sheet, base, lines)
    takes = dict.fromkeys([-1, *range(len(feet))], 0)
    kept = outgoing = 0
    for index, foot in enumerate(feet):
        at_end = foot.kept_rows + foot.gathered + transient * foot.end_peak if foot.stashed else 0
        there = kept + outgoing + foot.skeletal + max(transient * foot.forward_peak, at_end)
        takes[index - 1] = max(takes[index - 1], there)
        outgoing = foot.outgoing if sheet.around.asynchronous else 0
        kept += foot.kept
    kept = landing = 0
    lower = -1
    gradients = gradients_above(sheet.around, feet)
    for index, foot in enumerate(feet):
        kept += foot.kept
        behind = held_behind(sheet.around, foot, last=index == len(feet) - 1)
        peak = transient * max(foot.rerun_peak + sheet.around.result, foot.backward_peak + behind - foot.spent)
        arriving = 0 if put_off(foot, landing) else landing
        takes[lower] = max(takes[lower], kept + foot.full + arriving + peak + gradients[index])
        if foot.copies:
            landing, lower = foot.landing, index
    return {index: takes[index] for index in lines}


def _solved(
    sheet: Sheet, budgets: Budgets, base: Sequence[Choice], lines: dict[int, Lines], *, device_rows: bool
) -> tuple[Choice, ...] | None:
    """The program's answer for the blocks of ``lines`` in whole granules; None: it has none.

    Where rounding breaks a budget it is solved again with room for that, so that what is rounded always keeps it.
    """
    for spare in (1, 2):
        rows = PrefixProgram(sheet, budgets, base, lines, device_rows, spare).solve()
        if rows is None:
            return None
        choices = _rounded(sheet, budgets, base, rows)
        if choices is not None:
            return choices
    return None


@dataclass(frozen=True, slots=True)
class _Rounding:
    """How the rows of one block may be rounded to whole granules, the fastest last.

    Attributes:
        least: neither more on the device nor in host memory than was meant, and up to two granules more are rebuilt.
        short: likewise, of less than all tokens: what has one size at any length is then made again.
        upper: the prefix rounded down, and no row more in host memory: some more may be on the device.
        lower: both numbers rounded down; as many rows less on the device may be more in host memory.
    """

    least: Choice
    short: Choice
    upper: Choice
    lower: Choice

    @classmethod
    def of(cls, tokens: int, prefix_rows: float, device_rows: float) -> _Rounding:
        host_rows = prefix_rows - device_rows
        prefix = round_prefix(prefix_rows + _ROW_TOLERANCE, tokens)
        whole = device_rows >= tokens - _ROW_TOLERANCE
        device = tokens if whole else whole_granules(device_rows + _ROW_TOLERANCE, tokens)
        fewer = round_prefix(device + host_rows + _ROW_TOLERANCE, tokens)
        short = min(fewer, round_prefix(tokens - 1, tokens))
        more = device if prefix - host_rows <= device + _ROW_TOLERANCE else device + granule(tokens)
        return cls(*(
            Choice(Executor.REPLAY, rows, min(stay, rows))
            for rows, stay in ((fewer, device), (short, device), (prefix, more), (prefix, device))
        ))  # fmt: skip


def _rounded(
    sheet: Sheet, budgets: Budgets, base: Sequence[Choice], rows: dict[int, tuple[float, float]]
) -> tuple[Choice, ...] | None:
    """``rows`` in whole granules: rounded down, and block by block otherwise where that breaks a budget."""
    ways = {index: _Rounding.of(sheet.lengths[index], *pair) for index, pair in rows.items()}

    def with_each(of: Mapping[int, Choice]) -> tuple[Choice, ...]:
        return tuple(of.get(index, choice) for index, choice in enumerate(base))

    lower = with_each({index: way.lower for index, way in ways.items()})
    if fits(sheet, budgets, lower):
        return lower
    for field in ("least", "short", "upper"):
        found: dict[int, Choice] = {index: getattr(way, field) for index, way in ways.items()}
        if fits(sheet, budgets, with_each(found)):
            break
    else:
        return None
    for index, way in ways.items():
        for choice in (way.upper, way.lower, way.least):
            if choice == found[index] or fits(sheet, budgets, with_each({**found, index: choice})):
                found[index] = choice
                break
    return with_each(found)
