"""A block's bytes as straight lines in the rows of its prefix, for the closed form and the linear program.

Between one granule and all but one, everything that execution copies or holds for a block on replay is linear
in its device rows, host rows and rebuilt rows. The lines are upper bounds at the ends too, where fewer things
are stored, so that a solution within budgets is a plan within budgets.
"""

from __future__ import annotations

from dataclasses import dataclass

from memo_runtime.planning.actions import block_actions, splits
from memo_runtime.planning.footprint import rerun_line
from memo_runtime.planning.rounding import granule
from memo_runtime.planning.sheet import Choice, Sheet
from memo_runtime.records import Action, BlockProfile, Executor
from memo_runtime.sizes import HOST_ALIGNMENT, slot_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """One block on replay with 0 < prefix < tokens, in bytes and seconds, in all or per token row.

    Attributes:
        copied: copied at any prefix. copied_per_host_row, copied_per_rebuilt_row: and for rows on the host,
            rebuilt.
        host_slack: most that the alignment of slots adds. kept, outgoing, full, landing: as in ``Footprint``,
            without the rows that ``copied_per_rebuilt_row`` adds to the last two.
        rerun_peak, rerun_peak_per_row: transient bytes of the rerun, in all and per rebuilt row.
        spent: as in ``Footprint``, likewise without the rows that ``spent_per_rebuilt_row`` adds.
        rerun_per_row: seconds. jump: bytes copied as soon as the prefix is not empty.
    """

    tokens: int
    step: int
    copied: int
    copied_per_host_row: float
    copied_per_rebuilt_row: float
    host_slack: int
    kept: int
    skeletal: int
    outgoing: int
    full: int
    landing: int
    spent: int
    spent_per_rebuilt_row: float
    rerun_peak: float
    rerun_peak_per_row: float
    rerun_per_row: float
    jump: int


def lines_of(sheet: Sheet, index: int) -> Lines:
    """The lines of block ``index``, which must be sliceable and longer than one granule."""
    block, tokens = sheet.blocks[index], sheet.lengths[index]
    step = granule(tokens)
    plan, foot = sheet.one(index, Choice(Executor.REPLAY, step))
    actions = plan.actions
    per_row = [
        (group.size.linear, action) for group, action in zip(block.groups, actions, strict=True) if splits(group)
    ]
    host_row = sum(size for size, action in per_row if action is Action.PREFIX)
    tail_row = sum(size for size, action in per_row if action is Action.TAIL)
    copied = sum(
        group.size.at(tokens) for group, action in zip(block.groups, actions, strict=True) if action is Action.HOST
    )
    slots = sum(action in (Action.HOST, Action.PREFIX, Action.TAIL) for action in actions)
    tail_bytes = round(tail_row * (tokens - step))
    # Rows that go to the host for the rerun alone are those that autograd does not read.
    rerun_peak, rerun_peak_per_row = rerun_line(block, tokens)
    return Lines(
        tokens=tokens,
        step=step,
        copied=copied,
        copied_per_host_row=host_row,
        copied_per_rebuilt_row=tail_row,
        host_slack=slots * HOST_ALIGNMENT,
        kept=plan.bytes_kept,
        skeletal=foot.skeletal,
        outgoing=foot.outgoing,
        full=foot.full - tail_bytes,
        landing=foot.landing - tail_bytes,
        spent=foot.spent - tail_bytes,
        spent_per_rebuilt_row=tail_row,
        rerun_peak=rerun_peak + block.output.at(tokens),
        rerun_peak_per_row=rerun_peak_per_row,
        rerun_per_row=_slope(block, tokens),
        jump=sum(_jump_bytes(block, actions, tokens)),
    )


def _slope(block: BlockProfile, tokens: int) -> float:
    """Seconds per rebuilt row, from the cost of rebuilding all of them."""
    return block.rebuild_seconds(tokens, written=True) / tokens


def _jump_bytes(block: BlockProfile, actions: tuple[Action, ...], tokens: int) -> list[int]:
    """Bytes of the groups that an empty prefix would rebuild and any other copies whole."""
    at_zero = block_actions(block, Executor.REPLAY, tokens, 0)
    return [
        slot_bytes(group.size.at(tokens))
        for group, action, zero in zip(block.groups, actions, at_zero, strict=True)
        if action is Action.HOST and zero is Action.REBUILD
    ]
