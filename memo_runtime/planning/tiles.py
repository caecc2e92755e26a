"""``tiled``: blocks that were captured run tile by tile; six things are chosen for all of them together.

* the *tile*: one of a few lengths, the largest first, since shorter tiles only save memory; twice the largest where all
  else stays as it is and memory is left, since the gaps between kernels are half as many then;
* how many blocks at the end of each stack keep their *stash* on the device, since nothing hides the fetch of the last;
* *alpha*, the share of tiles whose matrix products are kept and not run again: on the device, or, of the blocks below
  those that keep their stash, in host memory;
* how many *groups of heads* attention runs in: as few as fit, since each but the first takes the segment before
  attention once more. (They also leave room for what is kept, which may be worth more; on a GPU that is not measured.)
* whether what attention is given (queries, keys, values) stays too, where all products do, of as many blocks as fit;
* of how many blocks that follow each other (``every``) only the first stashes its *input*. The others make theirs
  again, which takes one segment for each: as few as fit, for the same reason.

For every number of blocks the largest alpha within both budgets is forecast, with all products on the device and with
those of the lower blocks in host memory, and the fastest is taken.

Where nothing of that fits, blocks are *late*: each fetches what it needs when it goes backward, which nothing hides,
and inputs are made again one after another. Of all runs and groups the fastest that fits is taken.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from memo_runtime.config import LEAST_TILE, Policy, Settings, longest_tile
from memo_runtime.planning.chain import in_runs, longest_chain
from memo_runtime.planning.limits import Budgets, fits
from memo_runtime.planning.search import largest
from memo_runtime.planning.sheet import Choice, PlanRequestError, Sheet
from memo_runtime.planning.strategy import Choices, Decision, Strategy, fastest
from memo_runtime.planning.treatment import at_prefix, floor_choices, kept_blocks
from memo_runtime.records import Executor

#: Parts of the longest tile that shorter ones are.
_SHORTER = (1, 2, 4, 8)
_ESTIMATED = "step time by tiles is estimated from that of the blocks as they are"
#: Lengths of runs of blocks of which one stashes its input. A run is on the device as a whole when its top block goes
#: backward, so long ones leave no room there.
_RUNS = (2, 4, 8)
_MOST_RESIDENTS = 12
_LATE = (
    "memory is short: each block by tiles fetches what it needs when it goes backward, which nothing hides, and inputs "
    "are made again one after another"
)
#: Of the longest tile that is planned with, how many times as long tiles become where all else stays.
_STRETCHED = (4, 2)
#: Alpha moves by this part at most, and by whole tiles.
_ALPHA_STEPS = 64


@dataclass(frozen=True, slots=True)
class ByTiles(Strategy):
    """``tiled``; what is None is chosen."""

    alpha: float | None
    keep_last: int | None
    tile: int | None

    def stand_bys(self, sheet: Sheet) -> Iterator[Choices]:
        """The least that tiles need, with the stash of many blocks on the device and of none."""
        for every in _runs(sheet):
            for tile in self._tiles(sheet):
                for groups in _groups(sheet):
                    for resident in self._residents(sheet)[:: -1 if self.keep_last is None else 1]:
                        yield by_tiles(sheet, self.alpha or 0.0, resident, tile, groups=groups, every=every)
        yield from self._late(sheet, self._tiles(sheet)[-1], _groups(sheet)[-1:])

    def decide(self, sheet: Sheet, budgets: Budgets) -> Decision | None:
        """The fastest within ``budgets``, of the shortest runs and at the largest tile at which any fits.

        Longer runs leave room for what is kept, which may be worth more; on a GPU that is not measured.
        """
        _refuse_unseen(sheet)
        for every in _runs(sheet):
            best = self._best(sheet, budgets, every) if self._some_fits(sheet, budgets, every) else None
            if best is not None:
                best = self._with_inputs(sheet, budgets, self._stretched(sheet, budgets, best))
                return Decision(best, () if _timed(sheet) else (_ESTIMATED,))
        for tile in self._tiles(sheet):
            best = fastest(sheet, budgets, list(self._late(sheet, tile, _groups(sheet))))
            if best is not None:
                return Decision(best, (_LATE, *(() if _timed(sheet) else (_ESTIMATED,))))
        return None

    def is_feasible(self, sheet: Sheet, budgets: Budgets) -> bool:
        """Whether ``decide`` finds a plan. Late blocks need least; where alpha is fixed others may send products."""
        if any(self._some_fits(sheet, budgets, every, late=True) for every in _late_runs(sheet)):
            return True
        _refuse_unseen(sheet)
        return self.alpha is not None and any(self._some_fits(sheet, budgets, every) for every in _runs(sheet))

    def _some_fits(self, sheet: Sheet, budgets: Budgets, every: int, *, late: bool = False) -> bool:
        """Whether anything with such runs fits, by what needs least: the shortest tile, the fewest or most groups."""
        tile, groups, alpha = self._tiles(sheet)[-1], _groups(sheet), self.alpha or 0.0
        least = alpha or 1 / _ALPHA_STEPS

        def with_residents(groups: int, keeps: float, sent: float) -> bool:
            def at(resident: int) -> Choices:
                return by_tiles(sheet, keeps, resident, tile, sent=sent, groups=groups, every=every, late=late)

            return any(fits(sheet, budgets, at(one)) for one in _likely(sheet, budgets, self._residents(sheet), at))

        return any(
            with_residents(count, keeps, sent)
            for count in dict.fromkeys((groups[-1], groups[0]))
            for keeps, sent in ((alpha, 0.0), *(() if late else ((alpha, least),)))
        )

    def _late(self, sheet: Sheet, tile: int, some_groups: Sequence[int]) -> Iterator[Choices]:
        """All blocks late, with runs of every length."""
        for every in _late_runs(sheet):
            for groups in some_groups:
                for resident in self._residents(sheet):
                    yield by_tiles(sheet, self.alpha or 0.0, resident, tile, groups=groups, every=every, late=True)

    def _best(self, sheet: Sheet, budgets: Budgets, every: int) -> Choices | None:
        for tile in self._tiles(sheet):
            for groups in _groups(sheet):
                found = self._all(sheet, budgets, _How(0, tile, groups, every), self._some_residents(sheet, every))
                best = fastest(sheet, budgets, found)
                if best is not None:
                    return best
        return None

    def _stretched(self, sheet: Sheet, budgets: Budgets, best: Choices) -> Choices:
        """``best`` with tiles several times the longest length, if that fits and as much is kept and sent as before.

        Gradients of weights are summed over tiles: fewer tiles are fewer sums.
        """
        if self.tile is None:
            for times in _STRETCHED:
                longer = self._longer(sheet, best, times * longest_tile(sheet.profile.rows))
                if longer is not None and fits(sheet, budgets, longer):
                    return longer
        return best

    def _longer(self, sheet: Sheet, best: Choices, tile: int) -> Choices | None:
        """``best`` with tiles of ``tile`` tokens in the place of the longest; None: less would be kept."""
        longest = longest_tile(sheet.profile.rows)
        found = tuple(
            replace(one, tile=tile) if one.tile == longest and tokens >= tile else one
            for one, tokens in zip(best, sheet.lengths, strict=True)
        )
        whole = all(one.prefix == tokens or one.prefix % one.tile == 0
                    for one, tokens in zip(found, sheet.lengths, strict=True) if one.tile)  # fmt: skip
        return found if whole else None

    def _with_inputs(self, sheet: Sheet, budgets: Budgets, best: Choices) -> Choices:
        """``best`` with what mixers are given on the device, of as many of the last blocks as fit.

        Only where all products stay there already, which saves more by byte.
        """
        some = [index for index, one in enumerate(best) if one.executor is Executor.TILED and _may_stay(sheet, index)]
        whole = all(best[index].prefix == sheet.lengths[index] and not best[index].sent for index in some)
        if self.alpha is not None or not some or not whole or any(best[i].groups > 1 or best[i].late for i in some):
            return best

        def at(count: int) -> Choices:
            last = {*some[len(some) - count :]}
            return tuple(replace(one, mixer_inputs=True) if index in last else one for index, one in enumerate(best))

        return at(largest(lambda count: fits(sheet, budgets, at(count)), len(some) + 1))

    def _all(self, sheet: Sheet, budgets: Budgets, which: _How, residents: Sequence[int]) -> list[Choices]:
        """Of ``residents``, numbers of blocks whose stash stays, what may be the fastest with each."""
        found = []
        for resident in residents:
            how = replace(which, resident=resident)
            alpha = self._most(sheet, budgets, how)
            if alpha is not None:
                found.append(how.at(sheet, alpha))
            if alpha is None or alpha < 1.0:
                found.extend(self._sending(sheet, budgets, how))
        return found

    def _most(self, sheet: Sheet, budgets: Budgets, how: _How) -> float | None:
        """The largest alpha that fits: what is kept is not run again."""

        def at(steps: int) -> bool:
            return fits(sheet, budgets, how.at(sheet, steps / _ALPHA_STEPS))

        if self.alpha is not None:
            return self.alpha if fits(sheet, budgets, how.at(sheet, self.alpha)) else None
        if at(_ALPHA_STEPS):
            return 1.0
        return largest(at, _ALPHA_STEPS) / _ALPHA_STEPS if at(0) else None

    def _sending(self, sheet: Sheet, budgets: Budgets, how: _How) -> Iterator[Choices]:
        """The lower blocks send as much as fits; the others keep on the device what fits beside that."""

        def at(sent: int, alpha: int) -> Choices:
            return how.at(sheet, alpha / _ALPHA_STEPS, sent=sent / _ALPHA_STEPS)

        if self.alpha is not None:
            yield how.at(sheet, self.alpha, sent=self.alpha)
            return
        if fits(sheet, budgets, at(1, 0)):
            sent = largest(lambda steps: fits(sheet, budgets, at(steps, 0)), _ALPHA_STEPS + 1)
            yield at(sent, largest(lambda steps: fits(sheet, budgets, at(sent, steps)), _ALPHA_STEPS + 1))

    def _tiles(self, sheet: Sheet) -> list[int]:
        if self.tile is not None:
            return [self.tile]
        longest = longest_tile(sheet.profile.rows)
        return list(dict.fromkeys(max(LEAST_TILE, longest // part) for part in _SHORTER))

    def _residents(self, sheet: Sheet) -> list[int]:
        """Numbers of blocks at the end of each stack whose stash stays, the most first."""
        if self.keep_last is not None:
            return [self.keep_last]
        return list(range(max(Counter(block.stack for block in sheet.blocks).values(), default=0), -1, -1))

    def _some_residents(self, sheet: Sheet, every: int) -> list[int]:
        """Those that are tried: with runs of several blocks no more than a dozen, so that planning is quick."""
        all_of_them = self._residents(sheet)
        if every == 1 or len(all_of_them) <= _MOST_RESIDENTS:
            return all_of_them
        last = len(all_of_them) - 1
        return [all_of_them[number * last // (_MOST_RESIDENTS - 1)] for number in range(_MOST_RESIDENTS)]


@dataclass(frozen=True, slots=True)
class _How:
    """What is the same while alpha is sought."""

    resident: int
    tile: int
    groups: int
    every: int

    def at(self, sheet: Sheet, alpha: float, *, sent: float = 0.0) -> Choices:
        return by_tiles(sheet, alpha, self.resident, self.tile, sent=sent, groups=self.groups, every=self.every)


def _may_stay(sheet: Sheet, index: int) -> bool:
    """What the mixers of block ``index`` are given can stay between forward and backward."""
    takes = sheet.blocks[index].tiled
    return takes is not None and takes.mixer_input_flops.linear > 0


def _likely(
    sheet: Sheet, budgets: Budgets, residents: Sequence[int], at: Callable[[int], Choices]
) -> Sequence[int]:
    """Those of ``residents``, numbers of blocks whose stash stays, the most first, at which ``at`` may fit.

    Each block whose stash stays takes nothing of the host, and more of the device while head and loss run. So those
    that need too much of the host are all at the end, those that need too much of the device there at the beginning.
    """
    device = bisect_left(residents, True, key=lambda one: not budgets.over_device(sheet.bytes_at_head(at(one))))
    host = bisect_left(residents, True, key=lambda one: budgets.over_host(sheet.host_bytes(at(one))) > 0)
    return residents[device:host]


def _runs(sheet: Sheet) -> list[int]:
    """Of how many blocks one may stash its input: powers of two up to the longest chain."""
    longest = longest_chain(sheet.blocks)
    return [1, *(every for every in _RUNS if every <= longest)]


def _late_runs(sheet: Sheet) -> list[int]:
    """Likewise where blocks are late: up to the whole chain."""
    longest = longest_chain(sheet.blocks)
    return [1 << power for power in range((longest - 1).bit_length() + 1)]


def _groups(sheet: Sheet) -> list[int]:
    """Numbers of groups of heads that some block can run in, the fewest first."""
    heads = {block.tiled.heads for block in sheet.blocks if block.tiled is not None}
    return sorted({1} | {count for each in heads for count in range(2, each + 1) if each % count == 0})


def some_by_tiles(sheet: Sheet) -> bool:
    """At least one block can run by tiles."""
    return any(block.tiled is not None for block in sheet.blocks)


def _timed(sheet: Sheet) -> bool:
    return all(block.tiled.seconds_per_flop for block in sheet.blocks if block.tiled is not None)


def by_tiles(
    sheet: Sheet, alpha: float, resident: int, tile: int, *, sent: float = 0.0, groups: int = 1, every: int = 1,
    late: bool = False,
) -> Choices:  # fmt: skip
    """Every block that can by tiles; the others are run again as a whole, or as much of them as has to be.

    ``sent``: alpha of the blocks whose stash does not stay, where they keep their products in host memory. ``groups``:
    of heads, as far as a block can be divided so, and not so few that its tensors are too large for a kernel.
    ``every``: of so many blocks of a chain the first alone stashes its input. ``late``: see ``chain.py``.
    """
    most = Counter(block.stack for block in sheet.blocks)
    kept = kept_blocks(sheet, min(resident, min(most.values(), default=0)))
    if resident >= max(most.values(), default=0):
        kept = frozenset(range(len(sheet.blocks)))
    made: dict[tuple[tuple[int, int], bool], Choice] = {}
    found = []
    for index in range(len(sheet.blocks)):
        key = sheet.kind(index), index in kept
        if key not in made:
            made[key] = _one_by_tiles(sheet, index, alpha, tile, sent=sent, groups=groups, stays=index in kept)
        found.append(made[key])
    return in_runs(sheet.blocks, found, every, late=late) if every > 1 or late else tuple(found)


def _one_by_tiles(
    sheet: Sheet, index: int, alpha: float, tile: int, *, sent: float, groups: int, stays: bool
) -> Choice:
    """Of block ``index``; ``stays``: its stash, on the device."""
    block, tokens = sheet.blocks[index], sheet.lengths[index]
    if block.tiled is None or tokens == 0:
        other = at_prefix(block, 0, tokens)
        return Choice(other.executor, other.prefix, other.device_rows, block.tiled_reason or other.reason)
    size = min(tile, tokens)
    count = -(-tokens // size)
    sends = sent > 0 and not stays
    prefix = min(tokens, int((sent if sends else alpha) * count + 1e-9) * size)
    return Choice(
        Executor.TILED, prefix, tokens if stays else 0, tile=size, sent=prefix if sends else 0,
        groups=block.tiled.groups_at(tokens, groups),
    )  # fmt: skip


def floor(sheet: Sheet, settings: Settings) -> Choices:
    """The choices that need least on the device: every activation sent away or made again."""
    either = settings.policy is Policy.AUTO and settings.keep_last is None and some_by_tiles(sheet)
    by_replay = [] if settings.policy is Policy.TILED else [floor_choices(sheet)]
    tiled = ByTiles(0.0, 0, settings.tile).stand_bys(sheet) if either or not by_replay else ()
    return min([*by_replay, *tiled], key=sheet.peak_bytes)


def tiles_seen(sheet: Sheet) -> bool:
    """Somebody tried to capture the blocks of this profile."""
    return any(block.tiled is not None or block.tiled_reason for block in sheet.blocks)


def _refuse_unseen(sheet: Sheet) -> None:
    """Refuse a profile for which nobody tried tiles.

    Raises:
        PlanRequestError: no block of it was captured or refused.
    """
    if any(block.tokens for block in sheet.blocks) and not tiles_seen(sheet):
        raise PlanRequestError(
            "policy='tiled' plans from what tiles take, and this profile says nothing of them: make it with "
            "memo.profile(model, batch, tiles=True)"
        )
