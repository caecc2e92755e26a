"""``replay`` and ``auto``: the strategies that let the linear program choose."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from memo_runtime.planning.limits import Budgets, fits
from memo_runtime.planning.rounding import round_prefix
from memo_runtime.planning.sheet import KEEP, Choice, Sheet
from memo_runtime.planning.single_alpha import ClosedForm
from memo_runtime.planning.strategy import Choices, Decision, Strategy, fastest
from memo_runtime.planning.swap import solve_prefixes
from memo_runtime.planning.treatment import all_kept, at_fraction, kept_blocks
from memo_runtime.records import Executor

#: Numbers of kept blocks that are tried first, evenly spaced, and in all; each costs a linear program.
_FIRST_TRIES = 5
_MOST_TRIES = 9

#: Where the neighbours of the best try are this close, what lies between is not worth more programs.
_FLAT = 1e-3


@dataclass(frozen=True, slots=True)
class FreeReplay(Strategy):
    """``replay``: a prefix per block by the linear program; the last blocks of each stack are kept."""

    keep_last: int | None
    device_rows: bool

    def stand_bys(self, sheet: Sheet) -> Iterator[Choices]:
        """Nothing but inputs and mixers swapped; everything swapped."""
        yield from _ends(sheet, kept_blocks(sheet, self.keep_last))

    def decide(self, sheet: Sheet, budgets: Budgets) -> Decision | None:
        """The program's answer, or the fastest stand-by; with those blocks left as they are for which there is room.

        Where nothing else fits, as many such blocks are tried as there is room for.
        """
        kept = kept_blocks(sheet, self.keep_last)
        best = _solved(sheet, budgets, kept, device_rows=self.device_rows)
        if self.device_rows:
            whole = _Whole.of(sheet, kept)
            found = whole.most(budgets) if best is None else [best, *whole.some(budgets)]
            found += [choices for one in found for choices in _all_but_a_granule(sheet, one)]
            best = fastest(sheet, budgets, found)
        return None if best is None else Decision(best)


@dataclass(frozen=True, slots=True)
class Auto(Strategy):
    """``auto``: everything kept if that fits; else the fastest number of kept blocks at the model's end."""

    def stand_bys(self, sheet: Sheet) -> Iterator[Choices]:
        """Everything kept; then every number of kept blocks, the rest at both ends."""
        yield all_kept(sheet)
        for count in range(len(sheet.blocks)):
            yield from _ends(sheet, _last(sheet, count))

    def decide(self, sheet: Sheet, budgets: Budgets) -> Decision | None:
        """The fastest plan over some numbers of kept blocks, by the program and the stand-bys of each.

        Where no stand-by fits, the program is asked with no block kept whole, and if need be with some.
        """
        everything = all_kept(sheet)
        if fits(sheet, budgets, everything):
            return Decision(everything, ("everything fits on the device, so nothing is moved",))
        counts = [
            count
            for count in range(len(sheet.blocks))
            if any(fits(sheet, budgets, choices) for choices in _ends(sheet, _last(sheet, count)))
        ]
        if not counts:
            return self._between(sheet, budgets)
        tries = _Tries(sheet, budgets)
        return Decision(tries.plan(lowest(counts, tries.seconds)))

    def _between(self, sheet: Sheet, budgets: Budgets) -> Decision | None:
        """The program's answer with no block kept whole, or else with as many as there is room for."""
        some = _most(sheet, budgets, lambda count: at_fraction(sheet, 0.0, _last(sheet, count)), len(sheet.blocks) - 1)
        solved = (_solved(sheet, budgets, _last(sheet, count), device_rows=True) for count in (0, *some))
        best = next((choices for choices in solved if choices is not None), None)
        return None if best is None else Decision(best)


@dataclass(frozen=True, slots=True)
class AutoOnHost(Strategy):
    """``auto`` where only the host is limited: as ``memo``, with as many blocks kept as the host's limit asks for."""

    def stand_bys(self, sheet: Sheet) -> Iterator[Choices]:
        """Those of ``memo``; then fewer and fewer blocks moved; everything kept, which always fits."""
        yield from ClosedForm(None).stand_bys(sheet)
        for count in range(len(kept_blocks(sheet, None)) + 1, len(sheet.blocks)):
            yield from _ends(sheet, _last(sheet, count))
        yield all_kept(sheet)

    def decide(self, sheet: Sheet, budgets: Budgets) -> Decision | None:
        """What ``memo`` decides, if that fits; else the first stand-by that does, and a note that says so."""
        decision = ClosedForm(None).decide(sheet, budgets)
        if decision is not None:
            return decision
        choices = self.first_fitting(sheet, budgets)
        if choices is None:
            return None
        kept = sum(choice == KEEP for choice in choices)
        return Decision(choices, (f"the host's limit leaves no room to move more: {kept} blocks stay on the device",))


@dataclass(slots=True)
class _Tries:
    """The best plan for each number of kept blocks that was tried."""

    sheet: Sheet
    budgets: Budgets
    _plans: dict[int, Choices] = field(default_factory=dict)

    def plan(self, count: int) -> Choices:
        """The best plan with ``count`` blocks kept, of which at least a stand-by fits."""
        if count not in self._plans:
            kept = _last(self.sheet, count)
            best = _solved(self.sheet, self.budgets, kept, device_rows=True)
            assert best is not None, "a stand-by with this many kept blocks fits"
            self._plans[count] = best
        return self._plans[count]

    def seconds(self, count: int) -> float:
        """Step time of that plan."""
        return self.sheet.step_seconds(self.plan(count))


def lowest(counts: Sequence[int], value: Callable[[int], float]) -> int:
    """The count of a sorted sequence with a low ``value``: evenly spaced tries, then halving around the best.

    Exact for up to ``_FIRST_TRIES`` counts; beyond, as good as ``value`` is free of dips between the tries.
    """
    last = len(counts) - 1
    tries = max(1, min(_FIRST_TRIES - 1, last))
    tried = {at: value(counts[at]) for at in sorted({round(last * i / tries) for i in range(tries + 1)})}
    while True:
        best = min(tried, key=lambda at: (tried[at], at))
        below = max((at for at in tried if at < best), default=best)
        above = min((at for at in tried if at > best), default=best)
        middles = {(below + best) // 2, (best + above + 1) // 2} - set(tried)
        flat = max(tried[below], tried[above]) <= tried[best] * (1 + _FLAT)
        if flat or not middles or len(tried) + len(middles) > _MOST_TRIES:
            return counts[best]
        tried.update({at: value(counts[at]) for at in sorted(middles)})


@dataclass(frozen=True, slots=True)
class _Whole:
    """Plans with all rows of some blocks left where the forward put them, which no line of the program leads to.

    They take no landing buffer and no copies on the device: of all ``free`` blocks, or of some at the end. The others
    are as in ``base``, or as the program says.
    """

    sheet: Sheet
    base: Choices
    free: tuple[int, ...]

    @classmethod
    def of(cls, sheet: Sheet, kept: frozenset[int]) -> _Whole:
        base = at_fraction(sheet, 0.0, kept)
        return cls(sheet, base, tuple(at for at, choice in enumerate(base) if choice == Choice(Executor.REPLAY)))

    def beside(self, count: int) -> Choices:
        """The last ``count`` free blocks so, and of the others nothing but inputs and mixers swapped."""
        lengths, whole = self.sheet.lengths, {*self.free[len(self.free) - count :]}
        return tuple(
            Choice(Executor.REPLAY, lengths[index], lengths[index]) if index in whole else choice
            for index, choice in enumerate(self.base)
        )

    def plan(self, budgets: Budgets, count: int, *, thorough: bool = False) -> Choices | None:
        """The best with the last ``count`` free blocks so; ``thorough``: see ``solve_prefixes``."""
        fixed = self.beside(count)
        others = None
        if count < len(self.free) and not _over_at_head(self.sheet, budgets, fixed):
            others = solve_prefixes(self.sheet, budgets, fixed, device_rows=True, thorough=thorough)
        return fastest(self.sheet, budgets, [fixed] if others is None else [fixed, others])

    def some(self, budgets: Budgets) -> Iterator[Choices]:
        """Those of all blocks, or of a few numbers of them."""
        everything = self.plan(budgets, len(self.free))
        if everything is not None:
            yield everything
            return
        found = (self.plan(budgets, count) for count in _spread(len(self.free)))
        yield from (one for one in found if one is not None)

    def most(self, budgets: Budgets) -> list[Choices]:
        """Those of as many blocks as there is room for, which takes least of the host."""
        counts = _most(self.sheet, budgets, self.beside, len(self.free))
        return [one for one in (self.plan(budgets, count, thorough=True) for count in counts) if one is not None]


def _most(sheet: Sheet, budgets: Budgets, at: Callable[[int], Choices], highest: int) -> list[int]:
    """The largest numbers up to ``highest`` at which ``at``, of which more take more, fits the device.

    Both while head and loss run, which room is made for elsewhere by what the program decides, and as it is.
    """
    head = bisect_left(range(highest + 1), True, key=lambda count: _over_at_head(sheet, budgets, at(count))) - 1
    all_along = next(
        (count for count in range(head, 0, -1) if not budgets.over_device(sheet.peak_bytes(at(count)))), 0
    )
    return [count for count in sorted({head, head - 1, all_along, all_along - 1}, reverse=True) if count > 0]


def _over_at_head(sheet: Sheet, budgets: Budgets, choices: Choices) -> bool:
    return budgets.over_device(sheet.bytes_at_head(choices)) > 0


def _spread(count: int) -> list[int]:
    """A few numbers between 0 and ``count``, evenly spaced."""
    return sorted({round(count * share / _FIRST_TRIES) for share in range(1, _FIRST_TRIES)} - {0, count})


def _solved(sheet: Sheet, budgets: Budgets, kept: frozenset[int], *, device_rows: bool) -> Choices | None:
    ends = list(_ends(sheet, kept))
    solved = solve_prefixes(sheet, budgets, ends[0], device_rows=device_rows)
    return fastest(sheet, budgets, ends if solved is None else [*_variants(sheet, solved), *ends])


def _variants(sheet: Sheet, choices: Choices) -> Iterator[Choices]:
    """``choices``, and with the last block's input and mixers on the device, where it is run again.

    It goes straight into backward: nothing would hide their copies, and they would be back before anything is freed.
    """
    yield choices
    if not choices or not sheet.around.asynchronous:
        return
    last = choices[-1]
    if last.executor is Executor.REPLAY and last.prefix < sheet.lengths[-1]:
        yield (*choices[:-1], replace(last, resident=True))


def _all_but_a_granule(sheet: Sheet, choices: Choices) -> Iterator[Choices]:
    """``choices`` with the last block run again for a few rows, where it was not, so that mixers may stay as well."""
    last, tokens = choices[-1], sheet.lengths[-1]
    prefix = round_prefix(tokens - 1, tokens)
    if last.executor is Executor.REPLAY and last.prefix == tokens and prefix and sheet.blocks[-1].sliceable:
        fewer = Choice(Executor.REPLAY, prefix, min(last.device_rows, prefix))
        yield from islice(_variants(sheet, (*choices[:-1], fewer)), 1, None)


def _last(sheet: Sheet, count: int) -> frozenset[int]:
    """The last ``count`` blocks of the model in call order."""
    return frozenset(range(len(sheet.blocks) - count, len(sheet.blocks)))


def _ends(sheet: Sheet, kept: frozenset[int]) -> Iterator[Choices]:
    for alpha in (0.0, 1.0):
        yield from _variants(sheet, at_fraction(sheet, alpha, kept))
