"""Which blocks stay on the device, which follow the policy, and which fall back and why."""

from __future__ import annotations

from memo_runtime.config import Policy, Settings
from memo_runtime.errors import BlockFallbackError
from memo_runtime.planning.rounding import prefix_of
from memo_runtime.planning.sheet import KEEP, Choice, PlanRequestError, Sheet
from memo_runtime.records import BlockProfile, Executor

#: MEMO's n - 2: the last two blocks go straight into backward, swapping them hides behind nothing.
_KEPT_BY_DEFAULT = 2

_NAMES_SHOWN = 5


def kept_blocks(sheet: Sheet, keep_last: int | None) -> frozenset[int]:
    """Indices of the blocks at the end of each stack that stay on the device.

    Raises:
        PlanRequestError: ``keep_last`` is more than a stack has.
    """
    stacks: dict[int, list[int]] = {}
    for index, block in enumerate(sheet.blocks):
        stacks.setdefault(block.stack, []).append(index)
    kept: set[int] = set()
    for stack, members in stacks.items():
        count = min(_KEPT_BY_DEFAULT, len(members) - 1) if keep_last is None else keep_last
        if count > len(members):
            first, last = sheet.blocks[members[0]].name, sheet.blocks[members[-1]].name
            raise PlanRequestError(
                f"keep_last={count}, but stack {stack} ({first} to {last}) has {len(members)} blocks: "
                f"give 0 to {len(members)}"
            )
        kept.update(members[len(members) - count :])
    return frozenset(kept)


def at_fraction(sheet: Sheet, alpha: float, kept: frozenset[int]) -> tuple[Choice, ...]:
    """Swap fraction ``alpha`` for every block that is not kept, falling back where a block cannot take it."""
    by_kind: dict[tuple[int, int], Choice] = {}
    found = []
    for index, (block, length) in enumerate(zip(sheet.blocks, sheet.lengths, strict=True)):
        kind = sheet.kind(index)
        if index not in kept and kind not in by_kind:
            by_kind[kind] = at_prefix(block, prefix_of(alpha, length), length)
        found.append(kept_choice(block, length) if index in kept else by_kind[kind])
    return tuple(found)


def all_kept(sheet: Sheet) -> tuple[Choice, ...]:
    """Every block left as it is."""
    return tuple(kept_choice(block, length) for block, length in zip(sheet.blocks, sheet.lengths, strict=True))


def kept_choice(block: BlockProfile, tokens: int) -> Choice:
    """The block stays as it is; with its reason where nothing of it is known, so that nobody counts on its bytes."""
    return KEEP if tokens else at_prefix(block, 0, tokens)


def at_prefix(block: BlockProfile, prefix: int, tokens: int) -> Choice:
    """``REPLAY`` with ``prefix``, or what ``block`` can do instead, with its reason."""
    if tokens == 0:
        return Choice(Executor.NATIVE, reason=block.reason or "its input was not found")
    if prefix >= tokens:
        return Choice(Executor.REPLAY, tokens)
    if block.sliceable or (prefix == 0 and block.replayable):
        return Choice(Executor.REPLAY, prefix)
    reason = block.reason or "it cannot be run on a slice of its tokens"
    if not block.rerunnable:
        return Choice(Executor.REPLAY, tokens, reason=reason)
    return Choice(Executor.REPLAY if block.replayable else Executor.RECOMPUTE, reason=reason)


def floor_choices(sheet: Sheet) -> tuple[Choice, ...]:
    """Every activation sent away or rebuilt."""
    return at_fraction(sheet, 0.0, frozenset())


def refuse_fallbacks(sheet: Sheet, choices: tuple[Choice, ...], settings: Settings) -> None:
    """With ``strict``, raise where a block could not take the policy.

    Raises:
        BlockFallbackError: naming blocks by reason.
    """
    if not settings.strict:
        return
    reasons: dict[str, list[str]] = {}
    for block, choice in zip(sheet.blocks, choices, strict=True):
        # Tiles are not what auto was asked for: replay is as good an answer.
        if choice.reason and not (settings.policy is Policy.AUTO and choice.reason == block.tiled_reason):
            reasons.setdefault(choice.reason, []).append(block.name)
    if not reasons:
        return
    count = sum(len(names) for names in reasons.values())
    lines = [
        f"strict=True and {count} of {len(sheet.blocks)} blocks cannot take policy '{settings.policy}'",
        *(f"  {_some(names)}: {reason}" for reason, names in reasons.items()),
        *_advice({choice.executor for choice in choices if choice.reason}),
    ]
    raise BlockFallbackError("\n".join(lines))


def _advice(executors: set[Executor]) -> list[str]:
    """What would work, by what such blocks would do without ``strict``."""
    lines = []
    if Executor.NATIVE in executors:
        lines.append("  try: strict=False, which leaves such blocks as they are, or name the others with blocks=")
    if executors - {Executor.NATIVE}:
        lines.append("  try: strict=False, which runs them again as a whole or swaps them, or policy='swap'")
    return lines


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
