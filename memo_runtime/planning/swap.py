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
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

from memo_runtime.planning.footprint import Footprint, copy_seconds
from memo_runtime.planning.forecast import (
    all_gradients,
    gradients_above,
    put_off,
    to_device_cover,
    to_host_cover,
)
from memo_runtime.planning.limits import Budgets, fits
from memo_runtime.planning.lines import Lines, lines_of
from memo_runtime.planning.modelling import load_pulp
from memo_runtime.planning.rounding import granule, round_prefix, whole_granules
from memo_runtime.planning.search import largest
from memo_runtime.planning.sheet import Choice, Sheet
from memo_runtime.records import Executor

_LOG = logging.getLogger("memo_runtime")

#: Share of a budget that the program leaves free for the tolerance of its floating-point solver.
_SOLVER_SLACK = 1e-6

#: A hidden copy is not free: of two equally fast plans the one that copies less wins.
_COPY_WEIGHT = 1e-4

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
    found: list[tuple[float, int, tuple[Choice, ...]]] = []
    tried: list[set[int]] = []
    for chosen in _line_ups(lines):
        open_blocks = _with_room(sheet, budgets, base, chosen)
        if set(open_blocks) in tried:
            continue
        tried.append(set(open_blocks))
        rows = _Program(sheet, budgets, base, open_blocks, device_rows).solve() if open_blocks else None
        choices = None if rows is None else _rounded(sheet, budgets, base, rows)
        if choices is not None:
            found.append((sheet.forecast(choices).step_seconds, len(found), choices))
    return min(found)[2] if found else None


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
    feet = [_least(foot, lines.get(index)) for index, foot in enumerate(sheet.footprints(base))]
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
        peak = max(transient * foot.rerun_peak, transient * foot.backward_peak - foot.spent)
        arriving = 0 if put_off(foot, landing) else landing
        if kept + foot.full + arriving + peak + there[index] > room:
            crowded.add(lower)
        if foot.copies:
            landing, lower = foot.landing, index
    return crowded & set(lines)


def _least(foot: Footprint, line: Lines | None) -> Footprint:
    """``foot`` with the least that its block holds at any prefix that is not empty."""
    if line is None:
        return foot
    return replace(
        foot,
        outgoing=line.outgoing,
        full=line.full,
        spent=line.spent,
        landing=line.landing,
        kept=line.kept,
        copies=True,
        rerun_peak=round(line.rerun_peak),
    )


@dataclass(slots=True)
class _Program:
    """Variables and rows; bytes as shares of their budget, seconds as shares of the step's compute."""

    sheet: Sheet
    budgets: Budgets
    base: Sequence[Choice]
    lines: dict[int, Lines]
    device_rows: bool
    _problem: Any = field(init=False)
    _possible: bool = field(init=False, default=True)
    _device: dict[int, Any] = field(init=False, default_factory=dict)
    _host: dict[int, Any] = field(init=False, default_factory=dict)

    def solve(self) -> dict[int, tuple[float, float]] | None:
        """(prefix rows, device rows) of every block with lines; None if no solution exists."""
        pulp = load_pulp()

        self._problem = pulp.LpProblem("swap", pulp.LpMinimize)
        for index in self.lines:
            most = 1 if self.device_rows else 0
            self._device[index] = self._variable(f"device_{index}", most)
            self._host[index] = self._variable(f"host_{index}", 1)
            self._problem += self._prefix(index) <= 1
        feet = [_least(foot, self.lines.get(index)) for index, foot in enumerate(self.sheet.footprints(self.base))]
        self._hold_host(feet)
        if self.budgets.device is not None:
            self._hold_device(feet, self.budgets.device)
        if not self._possible:
            return None
        self._minimise(feet)
        status = _run(self._problem)
        if status != pulp.LpStatusOptimal:
            return None
        return {
            index: (
                (self._device[index].value() + self._host[index].value()) * line.tokens,
                self._device[index].value() * line.tokens,
            )
            for index, line in self.lines.items()
        }

    def _variable(self, name: str, most: float | None = None) -> Any:
        """A variable of at least 0."""
        pulp = load_pulp()

        if hasattr(self._problem, "add_variable"):
            return self._problem.add_variable(name, 0, most)
        return pulp.LpVariable(name, 0, most)

    def _prefix(self, index: int) -> Any:
        return self._device[index] + self._host[index]

    def _rebuilt_bytes(self, index: int) -> Any:
        """Bytes that are copied for the rows that are rebuilt, with a granule for rounding."""
        line = self.lines[index]
        if not line.copied_per_rebuilt_row:
            return 0
        rows = line.tokens * (1 - self._prefix(index)) + line.step
        return line.copied_per_rebuilt_row * rows

    def _rerun_bytes(self, index: int, foot: Footprint) -> Any:
        """Transient bytes of the block's rerun, with a granule for rounding."""
        if index not in self.lines:
            return foot.rerun_peak
        line = self.lines[index]
        return line.rerun_peak + line.rerun_peak_per_row * (line.tokens * (1 - self._prefix(index)) + line.step)

    def _copied(self, index: int) -> Any:
        line = self.lines[index]
        host = line.copied_per_host_row * line.tokens * self._host[index]
        return line.copied + host + self._rebuilt_bytes(index)

    def _hold_host(self, feet: Sequence[Footprint]) -> None:
        pulp = load_pulp()

        fixed = sum(
            self.sheet.one(index, self.base[index])[0].host_bytes
            for index in range(len(feet))
            if index not in self.lines
        )
        total = pulp.lpSum([self._copied(index) + line.host_slack for index, line in self.lines.items()])
        limit = self.budgets.host * (1 - _SOLVER_SLACK)
        self._problem += (total + fixed) * (1 / max(1.0, limit)) <= limit / max(1.0, limit)

    def _hold_device(self, feet: Sequence[Footprint], limit: int) -> None:
        """A row for every point of the step; the bytes kept up to a block are a variable of their own."""

        around = self.sheet.around
        transient = 1 if around.asynchronous else 0
        room = limit * (1 - _SOLVER_SLACK) - around.base_bytes
        scale = 1 / max(1.0, float(limit))
        kept: Any = 0
        outgoing = 0
        landing: Any = 0
        there = gradients_above(around, feet)
        for index, foot in enumerate(feet):
            forward = outgoing + foot.skeletal + transient * foot.forward_peak
            self._hold(kept + scale * (forward - room))
            after = kept + scale * foot.kept
            if index in self.lines:
                line = self.lines[index]
                rows = scale * line.copied_per_host_row * line.tokens
                after = self._variable(f"kept_{index}")
                self._problem += after == kept + scale * foot.kept + rows * self._device[index]
            if foot.stashed:
                # Of what is kept, only rows are copied: the rest is among what the forward saved.
                at_end = outgoing + foot.skeletal + foot.gathered + transient * foot.end_peak
                self._hold(after + scale * (at_end - (foot.kept - foot.kept_rows) - room))
            kept = after
            fetched = self._rebuilt_bytes(index) if index in self.lines else 0
            # What depends on a variable is never few beside what a block frees.
            waits = isinstance(landing, int) and put_off(foot, landing)
            backward = foot.full + fetched + (0 if waits else landing) + there[index]
            if index in self.lines or foot.rerun_peak or foot.spent:
                self._hold(kept + scale * (backward + transient * self._rerun_bytes(index, foot) - room))
            # What autograd does not read is gone again: all of the rows that are copied to be rebuilt from.
            read = backward - fetched - foot.spent
            self._hold(kept + scale * (read + transient * foot.backward_peak - room))
            if foot.copies:
                landing = foot.landing + fetched
            outgoing = foot.outgoing if around.asynchronous else 0
        self._hold(kept + scale * (around.outside_peak + around.outside_gradients - room))
        self._hold(scale * (all_gradients(around, feet) - room))

    def _hold(self, excess: Any) -> None:
        """``excess`` must not be positive."""
        if isinstance(excess, (int, float)):
            self._possible = self._possible and excess <= 0
            return
        self._problem += excess <= 0

    def _minimise(self, feet: Sequence[Footprint]) -> None:
        pulp = load_pulp()

        around, link = self.sheet.around, self.sheet.profile.link
        scale = 1 / max(1e-9, sum(foot.forward + foot.backward for foot in feet))
        again = {
            index: scale * line.rerun_per_row * line.tokens * (1 - self._prefix(index))
            for index, line in self.lines.items()
        }
        out: list[Any] = [scale * foot.to_host for foot in feet]
        back: list[Any] = [scale * foot.to_device for foot in feet]
        for index in self.lines:
            copied = self._copied(index)
            out[index] = copied * (scale * copy_seconds(1, link.to_host))
            back[index] = copied * (scale * copy_seconds(1, link.to_device))
        costs = list(again.values())
        copies = [out[index] + back[index] for index in self.lines]
        if not around.asynchronous:
            self._problem += pulp.lpSum(costs + copies)
            return
        covers = to_host_cover(feet)
        for index, foot in enumerate(feet):
            if not foot.copies:
                continue
            above = to_device_cover(feet, index)
            cover = pulp.lpSum([again.get(j, scale * feet[j].again) + scale * feet[j].backward for j in above])
            late_out = self._variable(f"late_out_{index}")
            late_back = self._variable(f"late_back_{index}")
            self._problem += late_out >= out[index] - scale * covers[index]
            self._problem += late_back >= back[index] - cover
            costs += [late_out, late_back]
        self._problem += pulp.lpSum(costs + [_COPY_WEIGHT * copy for copy in copies])


def _run(problem: Any) -> int:
    """Solve with CBC, silently and on one thread; the status is that of ``pulp``."""
    pulp = load_pulp()

    with warnings.catch_warnings():
        # PuLP 3 announces that version 4 will get CBC from elsewhere, under another name.
        warnings.simplefilter("ignore", DeprecationWarning)
        bundled = hasattr(pulp, "PULP_CBC_CMD")
        solver = pulp.PULP_CBC_CMD(msg=False, threads=1) if bundled else pulp.COIN_CMD(msg=False, threads=1)
        try:
            return int(problem.solve(solver))
        except pulp.PulpSolverError as error:
            _LOG.warning("the linear program was not solved, a simpler plan is used: %s", error)
            return int(pulp.LpStatusNotSolved)


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
