"""Blocks whose input is made again from the stash of the block below, instead of being stashed.

Blocks of one stack that follow each other, run by tiles and are handed each other's results form a chain. Of ``every``
blocks of a chain the first stashes its input.

Where they are *late*, nothing of a run is on the device but what the block at hand needs: the inputs of its run are
made one after another, from the first on, and each goes when the next is there. So the block ``n`` above the first of
its run takes ``n`` segments, and a run may be as long as a chain.
"""

from __future__ import annotations

from collections.abc import Sequence

from memo_runtime.planning.sheet import Choice
from memo_runtime.records import BlockPlan, BlockProfile, Executor


def can_follow(lower: BlockProfile, block: BlockProfile) -> bool:
    """The input of ``block`` can be made again from what ``lower``, which is called before it, has stashed."""
    if lower.tiled is None or block.tiled is None or lower.stack != block.stack:
        return False
    return block.tiled.chained and bool(lower.tiled.result) and bool(block.tiled.result)


def longest_chain(blocks: Sequence[BlockProfile]) -> int:
    """Blocks of the longest chain."""
    longest = length = 0
    for index, block in enumerate(blocks):
        length = length + 1 if index and can_follow(blocks[index - 1], block) else 1
        longest = max(longest, length)
    return longest


def in_runs(
    blocks: Sequence[BlockProfile], choices: Sequence[Choice], every: int, *, late: bool = False
) -> tuple[Choice, ...]:
    """``choices`` where of ``every`` blocks of a chain only the first stashes its input."""
    wanted, length = [], 0
    for index in range(len(blocks)):
        length = length + 1 if _follows(blocks, choices, index) else 0
        wanted.append(bool(length % every))
    return _agreed(choices, wanted, late=late)


def still_linked(blocks: Sequence[BlockProfile], choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """``choices`` in which inputs that cannot be made again any more are stashed."""
    return _agreed(
        choices, [one.from_below and _follows(blocks, choices, index) for index, one in enumerate(choices)]
    )


def _follows(blocks: Sequence[BlockProfile], choices: Sequence[Choice], index: int) -> bool:
    if not index or choices[index].executor is not Executor.TILED or choices[index - 1].executor is not Executor.TILED:
        return False
    return can_follow(blocks[index - 1], blocks[index])


def _agreed(choices: Sequence[Choice], wanted: Sequence[bool], *, late: bool = False) -> tuple[Choice, ...]:
    """``choices`` with their inputs made from below where ``wanted``; ``late``: all blocks by tiles are."""
    found: list[Choice] = []
    # Most choices are one object for many blocks, which stays so.
    known: dict[tuple[int, bool, bool, int], Choice] = {}
    following = 0  # blocks above in the same run
    for one, below in zip(reversed(choices), reversed(wanted), strict=True):
        is_late = one.late or (late and one.executor is Executor.TILED)
        passes = following if is_late else 0
        key = id(one), below, following > 0, passes
        if key not in known:
            known[key] = _linked(one, from_below=below, for_above=following > 0, late=is_late, passes=passes)
        found.append(known[key])
        following = following + 1 if below else 0
    return tuple(reversed(found))


def _linked(one: Choice, *, from_below: bool, for_above: bool, late: bool, passes: int) -> Choice:
    """``one`` with these; field by field, which takes a fifth of the time of ``dataclasses.replace``."""
    return Choice(
        one.executor, one.prefix, one.device_rows, one.reason, one.tile, one.resident, one.sent, one.groups,
        from_below, for_above, late, passes, one.mixer_inputs,
    )  # fmt: skip


def wrong_link(blocks: Sequence[BlockProfile], plans: Sequence[BlockPlan], index: int) -> str:
    """What is expected of ``from_below`` of block ``index``; empty where it can be so."""
    planned, lower = plans[index], plans[index - 1] if index else None
    if planned.from_below and lower is not None and lower.late != planned.late:
        return "false: of it and the block below only one is late"
    if not planned.from_below:
        return "" if lower is None or not lower.for_above else "true: the block below says for_above"
    if lower is None or lower.executor is not Executor.TILED or planned.executor is not Executor.TILED:
        return "false: it and the block below do not both run by tiles"
    if not can_follow(blocks[index - 1], blocks[index]):
        return "false: its input cannot be made from what the block below has"
    if not lower.for_above:
        return "false: the block below does not say for_above"
    if lower.device_rows and not planned.device_rows:
        return "false: the stash of the block below stays on the device, and that of this one does not"
    return ""


def wrong_late(plans: Sequence[BlockPlan], index: int) -> tuple[str, str]:
    """(field of block ``index``, what is expected of it) where what it says of a late run cannot be; else empty."""
    planned = plans[index]
    if planned.late and planned.executor is not Executor.TILED:
        return "late", f"false for executor {planned.executor}"
    if planned.late and planned.sent:
        return "late", "false: products come back from host memory"
    following = 0
    while planned.late and index + following + 1 < len(plans) and plans[index + following + 1].from_below:
        following += 1
    return ("passes", f"{following}, the blocks above it in its run") if planned.passes != following else ("", "")
