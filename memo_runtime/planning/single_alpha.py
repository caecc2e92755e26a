"""Policies with one swap fraction for all blocks: given by name, by the user, or by MEMO's closed form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memo_runtime.planning.limits import Budgets, fits
from memo_runtime.planning.lines import lines_of
from memo_runtime.planning.memo_alpha import MemoAlpha, SwapDemand, memo_alpha
from memo_runtime.planning.rounding import granule
from memo_runtime.planning.search import largest
from memo_runtime.planning.sheet import KEEP, Sheet
from memo_runtime.planning.strategy import Choices, Decision, Strategy
from memo_runtime.planning.treatment import at_fraction, at_prefix, kept_blocks


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
    return memo_alpha(demands, to_host_rate=sheet.profile.link.to_host, host_bytes=max(0, budgets.host - taken))
