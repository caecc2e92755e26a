"""The variables and rows of ``swap``'s linear program.

Bytes are shares of their budget, seconds shares of the step's compute. What no variable changes is a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from memo_runtime.planning.cbc import solve
from memo_runtime.planning.footprint import Footprint, copy_seconds
from memo_runtime.planning.forecast import (
    Surroundings,
    all_gradients,
    gradients_above,
    held_behind,
    put_off,
    to_device_cover,
    to_host_cover,
)
from memo_runtime.planning.limits import Budgets
from memo_runtime.planning.linear import Linear, LinearProgram, Sense, total
from memo_runtime.planning.lines import Lines
from memo_runtime.planning.sheet import Choice, Sheet

#: Share of a budget that the program leaves free for the tolerance of its floating-point solver.
_SOLVER_SLACK = 1e-6

#: A hidden copy is not free: of two equally fast plans the one that copies less wins.
_COPY_WEIGHT = 1e-4


def least_of(sheet: Sheet, base: Sequence[Choice], lines: Mapping[int, Lines]) -> list[Footprint]:
    """Footprints of ``base``; of blocks with ``lines`` the least that they hold and take at any prefix not empty."""
    known: dict[tuple[int, int], Footprint] = {}
    found = []
    for index, foot in enumerate(sheet.footprints(base)):
        line = lines.get(index)
        if line is None:
            found.append(foot)
            continue
        key = id(foot), id(line)
        if key not in known:
            known[key] = replace(
                foot,
                outgoing=line.outgoing,
                full=line.full,
                spent=line.spent,
                landing=line.landing,
                kept=line.kept,
                copies=True,
                again=0.0,
                rerun_peak=round(line.rerun_peak),
            )
        found.append(known[key])
    return found


def _at_head(around: Surroundings) -> int:
    """Bytes beside what is kept while head and loss run."""
    return max(around.loss_peak, around.outside_peak - around.entry) + around.outside_gradients


@dataclass(frozen=True, slots=True)
class _Shares:
    """Of one block's tokens those on the device and in host memory, and what follows from them in bytes.

    ``rebuilt``: copied for the rows that are rebuilt, ``rerun``: transient in their rerun, both with ``spare`` granules
    for rounding. ``copied``: in all.
    """

    device: Linear
    prefix: Linear
    rebuilt: Linear | int
    rerun: Linear
    copied: Linear

    @classmethod
    def of(cls, line: Lines, device: Linear, host: Linear, spare: int) -> _Shares:
        prefix = device + host
        rows = line.tokens * (1 - prefix) + spare * line.step
        rebuilt = line.copied_per_rebuilt_row * rows if line.copied_per_rebuilt_row else 0
        return cls(
            device=device,
            prefix=prefix,
            rebuilt=rebuilt,
            rerun=line.rerun_peak + line.rerun_peak_per_row * rows,
            copied=line.copied + line.copied_per_host_row * line.tokens * host + rebuilt,
        )


@dataclass(slots=True)
class PrefixProgram:
    """The program for the blocks that have ``lines``.

    ``device_rows``: rows may also stay on the device. ``spare``: granules of each block by which rounding may add to
    what is rebuilt.
    """

    sheet: Sheet
    budgets: Budgets
    base: Sequence[Choice]
    lines: dict[int, Lines]
    device_rows: bool
    spare: int = 1
    _program: LinearProgram = field(init=False, default_factory=LinearProgram)
    _possible: bool = field(init=False, default=True)
    _shares: dict[int, _Shares] = field(init=False, default_factory=dict)

    def solve(self) -> dict[int, tuple[float, float]] | None:
        """(prefix rows, device rows) of every block with lines; None if no solution exists."""
        feet = least_of(self.sheet, self.base, self.lines)
        if self._fixed_on_host(feet) + self._least_on_host(feet) > self.budgets.host:
            return None
        for index, line in self.lines.items():
            device = self._program.variable(f"device_{index}", 1 if self.device_rows else 0)
            host = self._program.variable(f"host_{index}", 1)
            self._shares[index] = shares = _Shares.of(line, device, host, self.spare)
            self._program.hold(shares.prefix - 1, Sense.AT_MOST)
        self._hold_host(feet)
        if self.budgets.device is not None:
            self._hold_device(feet, self.budgets.device)
        if not self._possible:
            return None
        self._minimise(feet)
        values = solve(self._program)
        if values is None:
            return None
        return {
            index: (shares.prefix.at(values) * line.tokens, shares.device.at(values) * line.tokens)
            for (index, line), shares in zip(self.lines.items(), self._shares.values(), strict=True)
        }

    def _hold_host(self, feet: Sequence[Footprint]) -> None:
        fixed = self._fixed_on_host(feet)
        copied = total(self._shares[index].copied + line.host_slack for index, line in self.lines.items())
        limit = self.budgets.host * (1 - _SOLVER_SLACK)
        self._program.hold((copied + fixed) * (1 / max(1.0, limit)) - limit / max(1.0, limit), Sense.AT_MOST)

    def _fixed_on_host(self, feet: Sequence[Footprint]) -> int:
        """Bytes of blocks without lines."""
        return sum(
            self.sheet.one(index, self.base[index])[0].host_bytes
            for index in range(len(feet))
            if index not in self.lines
        )

    def _least_on_host(self, feet: Sequence[Footprint]) -> float:
        """Bytes on the host at least, of blocks with lines, where the device has what head and loss leave.

        Most programs without a solution are seen by it, which takes no solver.
        """
        lines = self.lines.values()
        by_rows = [
            (line.copied_per_rebuilt_row, line.copied_per_host_row) for line in lines if line.copied_per_rebuilt_row
        ]
        most = sum(line.copied_per_rebuilt_row * line.tokens for line in lines)
        if all(rebuilt < host for rebuilt, host in by_rows):
            # Only rows on the device make it less.
            room = self._room_at_head(feet) if self.device_rows else 0.0
            most = min(most, max(0.0, room) * max((rebuilt / host for rebuilt, host in by_rows), default=0.0))
        spare = sum(self.spare * line.copied_per_rebuilt_row * line.step for line in lines)
        at_none = sum(line.copied + line.copied_per_rebuilt_row * line.tokens + line.host_slack for line in lines)
        return at_none + spare - most

    def _room_at_head(self, feet: Sequence[Footprint]) -> float:
        """Device bytes for rows while head and loss run."""
        if self.budgets.device is None:
            return float("inf")
        room = self.budgets.device * (1 - _SOLVER_SLACK) - self.sheet.around.base_bytes
        return room - _at_head(self.sheet.around) - sum(foot.kept for foot in feet)

    def _hold_device(self, feet: Sequence[Footprint], limit: int) -> None:
        """A row for every point of the step; the bytes kept up to a block are a variable of their own."""
        around = self.sheet.around
        transient = 1 if around.asynchronous else 0
        room = limit * (1 - _SOLVER_SLACK) - around.base_bytes
        # What the first block is given may be gone when blocks go backward.
        later = room + around.entry
        scale = 1 / max(1.0, float(limit))
        kept: Linear | float = 0
        outgoing = 0
        landing: Linear | int = 0
        there = gradients_above(around, feet)
        for index, foot in enumerate(feet):
            forward = outgoing + foot.skeletal + transient * foot.forward_peak
            self._hold(kept + scale * (forward - room))
            after = kept + scale * foot.kept
            if index in self.lines:
                line = self.lines[index]
                rows = scale * line.copied_per_host_row * line.tokens
                summed = kept + scale * foot.kept + rows * self._shares[index].device
                after = self._program.variable(f"kept_{index}")
                self._program.hold(after - summed, Sense.EQUAL)
            if foot.stashed:
                # Of what is kept, only rows are copied: the rest is among what the forward saved.
                at_end = outgoing + foot.skeletal + foot.gathered + transient * foot.end_peak
                self._hold(after + scale * (at_end - (foot.kept - foot.kept_rows) - room))
            kept = after
            fetched = self._shares[index].rebuilt if index in self.lines else 0
            rerun = self._shares[index].rerun if index in self.lines else foot.rerun_peak
            # What depends on a variable is never few beside what a block frees.
            waits = isinstance(landing, int) and put_off(foot, landing)
            backward = foot.full + fetched + (0 if waits else landing) + there[index]
            if index in self.lines or foot.rerun_peak or foot.spent:
                self._hold(kept + scale * (backward + transient * rerun + around.result - later))
            # What autograd does not read is gone again: all of the rows that are copied to be rebuilt from.
            read = backward - fetched - foot.spent
            peak = foot.backward_peak + held_behind(around, foot, last=index == len(feet) - 1)
            self._hold(kept + scale * (read + transient * peak - later))
            if foot.copies:
                landing = foot.landing + fetched
            outgoing = foot.outgoing if around.asynchronous else 0
        self._hold(kept + scale * (_at_head(around) - room))
        self._hold(scale * (all_gradients(around, feet) + around.result + around.embedding_peak - later))

    def _hold(self, excess: Linear | float) -> None:
        """``excess`` must not be positive."""
        if isinstance(excess, Linear):
            self._program.hold(excess, Sense.AT_MOST)
        else:
            self._possible = self._possible and excess <= 0

    def _minimise(self, feet: Sequence[Footprint]) -> None:
        around, link = self.sheet.around, self.sheet.profile.link
        scale = 1 / max(1e-9, sum(foot.forward + foot.backward for foot in feet))
        again = {
            index: scale * line.rerun_per_row * line.tokens * (1 - self._shares[index].prefix)
            for index, line in self.lines.items()
        }
        out: list[Linear | float] = [scale * foot.to_host for foot in feet]
        back: list[Linear | float] = [scale * foot.to_device for foot in feet]
        for index, shares in self._shares.items():
            out[index] = shares.copied * (scale * copy_seconds(1, link.to_host))
            back[index] = shares.copied * (scale * copy_seconds(1, link.to_device))
        costs: list[Linear | float] = list(again.values())
        copies = [out[index] + back[index] for index in self.lines]
        if not around.asynchronous:
            self._program.objective = total(costs + copies)
            return
        covers = to_host_cover(feet)
        for index, foot in enumerate(feet):
            if not foot.copies:
                continue
            above = to_device_cover(feet, index)
            cover = total(again.get(j, scale * feet[j].again) + scale * feet[j].backward for j in above)
            late_out = self._program.variable(f"late_out_{index}")
            late_back = self._program.variable(f"late_back_{index}")
            self._program.hold(late_out - (out[index] - scale * covers[index]), Sense.AT_LEAST)
            self._program.hold(late_back - (back[index] - cover), Sense.AT_LEAST)
            costs += [late_out, late_back]
        self._program.objective = total(costs + [_COPY_WEIGHT * copy for copy in copies])
