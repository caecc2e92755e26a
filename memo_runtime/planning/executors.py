"""``auto`` where both executors may run: whether tiles are worth trying, and which of the two is faster.

What blocks take by tiles is known only after they were captured, and compiled on a GPU, which takes longer than many
steps. So the model is profiled and planned for replay first, and its blocks are tried by tiles only if

* no plan by replay fits, or
* on a GPU, compiled tiles that keep everything would make the step shorter, by enough for the steps to come: than by
  replay, and where everything fits also than the blocks as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isclose

from memo_runtime.config import Policy, Settings
from memo_runtime.planning.freedom import Auto
from memo_runtime.planning.limits import Budgets
from memo_runtime.planning.sheet import KEEP, Sheet
from memo_runtime.planning.strategy import Choices, Decision, Strategy
from memo_runtime.planning.tiles import ByTiles, some_by_tiles, tiles_seen
from memo_runtime.records import Executor
from memo_runtime.units import format_seconds

#: Share of a step that compiled tiles save at least, since they fuse what the blocks themselves do one by one: 3.6 to
#: 6.3 % with everything kept (4 blocks of llama-8b at 32,768 and 65,536 tokens on one H200, benchmarks/results/
#: harness_tiled_h200.jsonl; tests/house/test_figures.py). What they take is measured once they are tried; this says
#: whether that is worth it.
_FUSED = 0.035
#: Steps that a run is taken to have, and seconds that capture and compilation take, in all and for each block.
_STEPS = 10_000
_PREPARING = 20.0
_PREPARING_EACH = 1.0

_BY_TILES = ByTiles(alpha=None, keep_last=None, tile=None)


def chooses_executors(settings: Settings, budgets: Budgets) -> bool:
    """Whether ``settings`` leave it open how blocks run; ``keep_last`` is of blocks, which tiles do not keep."""
    return settings.policy is Policy.AUTO and settings.keep_last is None and budgets.device is not None


def tiles_are_worth_trying(sheet: Sheet, settings: Settings, step_seconds: float | None) -> bool:
    """Whether blocks should be captured before ``auto`` plans for ``sheet``, which says nothing of tiles.

    ``step_seconds``: of the best plan by replay; None: none fits.
    """
    budgets = Budgets.of(sheet, settings)
    hopeless = not any(sheet.lengths) or budgets.over_device(sheet.around.base_bytes) > 0
    if hopeless or tiles_seen(sheet) or not chooses_executors(settings, budgets):
        return False
    if step_seconds is None or not sheet.around.asynchronous:
        return step_seconds is None
    return _pays(sheet, step_seconds)


@dataclass(frozen=True, slots=True)
class EitherExecutor(Strategy):
    """``auto``: the faster of the best plan by replay and the best by tiles, where these were tried."""

    def stand_bys(self, sheet: Sheet) -> Iterator[Choices]:
        """Those of replay, then those of tiles."""
        yield from Auto().stand_bys(sheet)
        if some_by_tiles(sheet):
            yield from _BY_TILES.stand_bys(sheet)

    def is_feasible(self, sheet: Sheet, budgets: Budgets) -> bool:
        """Whether one of the two is."""
        by_tiles = some_by_tiles(sheet) and _BY_TILES.is_feasible(sheet, budgets)
        return by_tiles or Auto().is_feasible(sheet, budgets)

    def decide(self, sheet: Sheet, budgets: Budgets) -> Decision | None:
        """The plan with the shorter step, and why the other is not taken."""
        by_replay = Auto().decide(sheet, budgets)
        if not tiles_seen(sheet):
            return by_replay if by_replay is None else _untried(sheet, by_replay)
        by_tiles = _BY_TILES.decide(sheet, budgets) if some_by_tiles(sheet) else None
        way = "as they are" if by_replay is not None and _is_kept(by_replay) else "by replay"
        chosen, note = by_replay, f"blocks run {way}: none can by tiles"
        if by_replay is None and by_tiles is not None:
            chosen, note = by_tiles, "blocks run by tiles: replay does not fit"
        elif by_replay is not None and by_tiles is not None:
            replay, tiles = (sheet.step_seconds(one.choices) for one in (by_replay, by_tiles))
            sooner = tiles < replay and not isclose(tiles, replay)  # estimates may say the same in other words
            taken, left = ("by tiles", way) if sooner else (way, "by tiles")
            chosen = by_tiles if sooner else by_replay
            first, second = sorted((tiles, replay))
            note = f"blocks run {taken}: a step of {format_seconds(first)}, and {format_seconds(second)} {left}"
        elif by_replay is not None and some_by_tiles(sheet):
            note = f"blocks run {way}: tiles do not fit"
        if chosen is None:
            return None
        return Decision(chosen.choices, (note, *_refusals(sheet), *chosen.notes))


def _is_kept(decision: Decision) -> bool:
    return all(choice.executor is Executor.KEEP for choice in decision.choices)


def _untried(sheet: Sheet, decision: Decision) -> Decision:
    """``decision`` with a note on tiles, which only a GPU has any use for where replay fits."""
    if not sheet.around.asynchronous:
        return decision
    step, keeps = sheet.step_seconds(decision.choices), _is_kept(decision)
    pays = _pays(sheet, step)  # then a run tries them, and this plan is of a profile without
    if pays and keeps:
        return decision
    note = "blocks were not tried by tiles"
    if not keeps:
        kept = _kept_seconds(sheet)
        share = 100 * (step - kept) / max(1e-12, kept)
        note += f": by replay a step takes {share:.1f} % longer than with everything kept"
    if not pays:
        note += (
            f"; these would take {format_seconds(_preparing(sheet))} before the first step, more than what {_STEPS:,} "
            "steps are taken to save (policy='tiled' tries them)"
        )
    return Decision(decision.choices, (*decision.notes, note))


def _pays(sheet: Sheet, step_seconds: float) -> bool:
    """Whether steps by tiles are taken to be so much shorter than ``step_seconds`` that a run makes up for them."""
    return step_seconds - (1 - _FUSED) * _kept_seconds(sheet) > _preparing(sheet) / _STEPS


def _preparing(sheet: Sheet) -> float:
    """Seconds that capture and compilation take."""
    return _PREPARING + _PREPARING_EACH * len(sheet.blocks)


def _refusals(sheet: Sheet) -> Iterator[str]:
    """Why blocks cannot run by tiles, a reason each."""
    reasons: dict[str, list[str]] = {}
    for block in sheet.blocks:
        if block.tiled is None and block.tiled_reason:
            reasons.setdefault(block.tiled_reason, []).append(block.name)
    for reason, names in reasons.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"'{names[0]}'{others} cannot run by tiles: {reason}"


def _kept_seconds(sheet: Sheet) -> float:
    return sheet.step_seconds((KEEP,) * len(sheet.blocks))
