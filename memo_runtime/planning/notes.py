"""What a plan says about its own assumptions."""

from __future__ import annotations

from collections.abc import Iterator

from memo_runtime.config import Settings
from memo_runtime.planning.executors import chooses_executors
from memo_runtime.planning.limits import Budgets
from memo_runtime.planning.sheet import KEEP, Choice, Sheet
from memo_runtime.planning.suggest import is_feasible
from memo_runtime.planning.tiles import tiles_seen
from memo_runtime.records import Executor
from memo_runtime.units import format_bytes


def notes_on(sheet: Sheet, choices: tuple[Choice, ...]) -> Iterator[str]:
    """What the plan assumes about the model and the lengths."""
    states = sheet.profile.states
    if states.assumed:
        by_default = format_bytes(states.optimizer // 2)
        more = f", and a fused step, where foreach=True, PyTorch's default, takes {by_default} more behind backward"
        yield (
            f"optimizer state is assumed: {states.optimizer_name}, reserved in full from the first step on"
            f"{more if sheet.around.asynchronous and states.optimizer else ''}"
        )
    else:
        stepping = f"; its step takes {format_bytes(states.stepping)} besides" if sheet.around.stepping else ""
        yield f"optimizer state is that of {states.optimizer_name}, reserved in full from the first step on{stepping}"
    moved = [
        (block, tokens)
        for block, tokens, choice in zip(sheet.blocks, sheet.lengths, choices, strict=True)
        if choice.executor is not Executor.NATIVE
    ]
    estimated = [block.name for block, _ in moved if any(group.estimated for group in block.groups)]
    if estimated:
        yield f"bytes of {_many(estimated)} depend on data and are estimates"
    unmanaged = [
        block.name for block, choice in zip(sheet.blocks, choices, strict=True) if choice.executor is Executor.NATIVE
    ]
    if unmanaged:
        yield f"bytes of {_many(unmanaged)} are not managed and not counted"
    idle = all(choice.executor in (Executor.KEEP, Executor.NATIVE) for choice in choices)
    untouched = sheet.peak_bytes((KEEP,) * len(choices))
    if not idle and sheet.peak_bytes(choices) >= untouched:
        yield (
            f"nothing is saved on the device: policy 'none' peaks at {format_bytes(untouched)} too (what these blocks "
            "hold is small at this length, or its copies and reruns take as much), so 'none' is faster"
        )
    if sheet.norm_by_tiles:
        yield "the norm behind the blocks runs by tiles: as it is, on all tokens at once, the step would not fit"
    timed = {block.timed_tokens for block, tokens in moved if 0 < block.timed_tokens < tokens}
    if timed:
        longest = max(sheet.lengths)
        yield f"seconds at {longest:,} tokens are extrapolated from {min(timed):,}"


def note_on_stacks(sheet: Sheet) -> Iterator[str]:
    """What a profile does not say of other lengths: how what one stack is given of another grows."""
    changed = max((one.tokens for one in sheet.blocks), default=0) != max(sheet.lengths, default=0)
    if changed and len({one.stack for one in sheet.blocks if one.tokens}) > 1:
        yield (
            "stacks have lengths in proportion to the profiled ones, and what blocks are given of another stack "
            "(cross-attention) counts at its profiled length: too much at shorter ones, too little at longer ones; a "
            "profile of a batch of this length counts it"
        )


def note_on_pairs(sheet: Sheet) -> Iterator[str]:
    """A profile of a short batch has a mask of all pairs of tokens where a longer one may have none."""
    lengths = zip(sheet.blocks, sheet.lengths, strict=True)
    longer = [block for block, tokens in lengths if 0 < block.tokens < tokens]
    if any(len(axes.dims) > 1 for block in longer for axes in block.arguments):
        yield (
            "what blocks are given of all pairs of tokens (a mask) counts with the square of the length, as it was "
            "profiled; transformers' models are given spans in its place from 16.8 million pairs on (4,096 tokens of "
            "one sequence), which take far less: a profile of a batch of this length counts those"
        )


def note_on_accumulation(sheet: Sheet, settings: Settings) -> Iterator[str]:
    """Whether a step that starts with gradients, as an accumulation's second micro-batch does, would be refused."""
    if not sheet.around.gradual:
        return
    accumulating = sheet.where(accumulating=True)
    if not is_feasible(accumulating, settings):
        gradients = format_bytes(sheet.profile.states.gradients)
        untried = chooses_executors(settings, Budgets.of(sheet, settings)) and not tiles_seen(sheet)
        yield (
            f"steps that start with gradients do not fit{' by replay' if untried else ''} (accumulation, "
            f"zero_grad(set_to_none=False)): {gradients} of them would be there at every point, here they come as "
            "backward walks down"
        )


def _many(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} blocks ({names[0]} and others)"
