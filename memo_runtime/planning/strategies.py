"""Policies: which plans each may make, and which it prefers.

A strategy offers *stand-bys*, plans that are worked out at once; a request is feasible exactly if one of them
fits both budgets, so an error message can try a hundred lengths without solving anything. What the strategy
then prefers (a closed form, a linear program) is taken only if it fits too, and is never slower than the best
stand-by.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from memo_runtime.config import FIXED_ALPHA, Policy, Settings
from memo_runtime.planning.limits import Budgets
from memo_runtime.planning.lines import lines_of
from memo_runtime.planning.memo_alpha import MemoAlpha, SwapDemand, memo_alpha
from memo_runtime.planning.rounding import granule
from memo_runtime.planning.search import largest
from memo_runtime.planning.sheet import KEEP, Choice, PlanRequestError, Sheet
from memo_runtime.planning.treatment import at_fraction, at_prefix, kept_blocks
from memo_runtime.records import Executor

Choices = tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """What a strategy chose, and what the plan should say about it."""

    choices: Choices
    notes: tuple[str, ...] = ()


class Strategy(ABC):
    """One policy."""

    @abstractmethod
    def stand_bys(self, sheet: Sheet) -> Iterator[Choices]:
        """Plans that the policy may make, the preferred first."""

    def decide(self, sheet: Sheet, budgets: Budgets) -> Decision | None:
        """The best plan within ``budgets``; None if no stand-by fits."""
        choices = self.first_fitting(sheet, budgets)
        return None if choices is None else Decision(choices)

    def first_fitting(self, sheet: Sheet, budgets: Budgets) -> Choices | None:
        """The first stand-by within ``budgets``."""
        return next((choices for choices in self.stand_bys(sheet) if fits(sheet, budgets, choices)), None)


def fits(sheet: Sheet, budgets: Budgets, choices: Choices) -> bool:
    """``choices`` keep within both budgets, by exact bytes."""
    return not (
        budgets.over_host(sheet.host_bytes(choices)) or budgets.over_device(sheet.peak_bytes(choices))
    )


@dataclass(frozen=True, slots=True)
class KeepAll(Strategy):
    """``none``: every byte stays on the device."""

    def stand_bys(self, sheet: Sheet) -> Iterator[Choices]:
        """One plan."""
        yield (KEEP,) * len(sheet.blocks)


@dataclass(frozen=True, slots=True)
class FixedFraction(Strategy):
    """``swap``, ``recompute``, and the policies that were given an alpha: nothing is left to choose."""

    alpha: float
    keep_last: int | None

    def stand_bys(self, sheet: Sheet) -> Iterator[Choices]:
        """One plan."""
        yield at_fraction(sheet, self.alpha, kept_blocks(sheet, self.keep_last))


@dataclass(frozen=True, slots=True)
class ClosedForm(Strategy):
    """``memo``: one alpha for all swapped blocks, from the paper's two constraints."""

    keep_last: int | None

    def stand_bys(self, sheet: Sheet) -> Iterator[Choices]:
        """Nothing but inputs and mixers swapped; everything swapped."""
        kept = kept_blocks(sheet, self.keep_last)
        yield at_fraction(sheet, 0.0, kept)
        yield at_fraction(sheet, 1.0, kept)

    def decide(self, sheet: Sheet, budgets: Budgets) -> Decision | None:
        """The closed form's alpha, lowered where alignment or the device asks for it."""
        found = closed_form(sheet, budgets, self.keep_last)
        kept = kept_blocks(sheet, self.keep_last)
        choices = at_fraction(sheet, found.alpha, kept)
        if fits(sheet, budgets, choices):
            note = f"alpha {found.alpha:.3f} by MEMO's closed form: {found.binding}"
            return Decision(choices, (note,))
        longest = max(sheet.lengths, default=1)
        step = granule(longest)
        granules = largest(
            lambda count: fits(sheet, budgets, at_fraction(sheet, count * step / longest, kept)),
            int(found.alpha * longest) // step + 1,
        )
        alpha = granules * step / longest
        choices = at_fraction(sheet, alpha, kept)
        if fits(sheet, budgets, choices):
            note = f"alpha {alpha:.3f}: MEMO's closed form gives {found.alpha:.3f}, which exceeds a budget"
            return Decision(choices, (note,))
        return Strategy.decide(self, sheet, budgets)


def closed_form(sheet: Sheet, budgets: Budgets, keep_last: int | None) -> MemoAlpha:
    """MEMO's alpha for the blocks of ``sheet`` that can be sliced and are not kept."""
    kept = kept_blocks(sheet, keep_last)
    demands = []
    taken = 0
    for index, (block, tokens) in enumerate(zip(sheet.blocks, sheet.lengths, strict=True)):
        if index in kept:
            continue
        if block.sliceable and tokens > granule(tokens):
            lines = lines_of(sheet, index)
            rebuilt = lines.copied_per_rebuilt_row * tokens
            demands.append(
                SwapDemand(
                    fixed_bytes=lines.copied + rebuilt,
                    token_bytes=lines.copied_per_host_row * tokens - rebuilt,
                    forward_seconds=block.forward_seconds.exact(tokens),
                )
            )
        else:
            taken += sheet.one(index, at_prefix(block, 0, tokens))[0].host_bytes
    return memo_alpha(
        demands, to_host_rate=sheet.profile.link.to_host, host_bytes=max(0, budgets.host - taken)
    )


def floor_choices(sheet: Sheet) -> Choices:
    """Every activation sent away or rebuilt."""
    return tuple(
        at_prefix(block, 0, tokens) for block, tokens in zip(sheet.blocks, sheet.lengths, strict=True)
    )


def strategy_for(settings: Settings, *, limited: bool) -> Strategy:
    """The strategy of ``settings``; ``limited`` says that there is a device budget to plan for.

    Raises:
        PlanRequestError: a policy that is not built.
    """
    policy = settings.policy
    if policy is Policy.TILED:
        built = ", ".join(p for p in Policy if p is not Policy.TILED)
        raise PlanRequestError(f"policy='tiled' is not built yet; there are: {built}")
    if policy is Policy.NONE:
        return KeepAll()
    alpha = FIXED_ALPHA.get(policy, settings.alpha)
    if alpha is not None:
        return FixedFraction(alpha, settings.keep_last)
    return ClosedForm(settings.keep_last)


def notes_on(sheet: Sheet, choices: Choices) -> Iterator[str]:
    """What the plan assumes about the model and the lengths."""
    states = sheet.profile.states
    if states.assumed:
        yield f"optimizer state is assumed: {states.optimizer_name}, reserved in full from the first step on"
    else:
        yield f"optimizer state is that of {states.optimizer_name}, reserved in full from the first step on"
    moved = [
        (block, tokens)
        for block, tokens, choice in zip(sheet.blocks, sheet.lengths, choices, strict=True)
        if choice.executor is not Executor.NATIVE
    ]
    estimated = [block.name for block, _ in moved if any(group.estimated for group in block.groups)]
    if estimated:
        yield f"bytes of {_many(estimated)} depend on data and are estimates"
    unmanaged = [
        block.name
        for block, choice in zip(sheet.blocks, choices, strict=True)
        if choice.executor is Executor.NATIVE
    ]
    if unmanaged:
        yield f"bytes of {_many(unmanaged)} are not managed and not counted"
    timed = {block.timed_tokens for block, tokens in moved if 0 < block.timed_tokens < tokens}
    if timed:
        longest = max(sheet.lengths)
        yield f"seconds at {longest:,} tokens are extrapolated from {min(timed):,}"


def _many(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} blocks ({names[0]} and others)"
