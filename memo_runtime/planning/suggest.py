"""What would fit instead: lengths, budgets and knobs, each planned before it is suggested."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from memo_runtime.config import Policy, Settings
from memo_runtime.errors import MemoError
from memo_runtime.planning.limits import Budgets
from memo_runtime.planning.policies import decide_somehow, strategy_for, with_norm_by_tiles
from memo_runtime.planning.rounding import granule
from memo_runtime.planning.search import largest
from memo_runtime.planning.sheet import Sheet, in_proportion
from memo_runtime.planning.strategy import Choices, Decision
from memo_runtime.planning.words import PythonWords, size_at_least
from memo_runtime.units import format_bytes, parse_bytes

#: Decimals of a suggested swap fraction.
_ALPHA_STEPS = 1000
#: Parts of what is missing of a budget.
_BUDGET_STEPS = 1024


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A change that makes the request feasible, in the user's words, with what it would take."""

    text: str
    peak_bytes: int
    host_bytes: int

    def __str__(self) -> str:
        taken = f"device {format_bytes(self.peak_bytes)}, host {format_bytes(self.host_bytes)}"
        return f"{self.text} ({taken})"


def is_feasible(sheet: Sheet, settings: Settings) -> bool:
    """Whether ``decide_somehow`` would find a plan, mostly without looking for the best one."""
    budgets = Budgets.of(sheet, settings)
    strategy, _ = strategy_for(settings, budgets)
    if strategy.is_feasible(sheet, budgets):
        return True
    less = with_norm_by_tiles(sheet, settings)
    return less is not None and strategy.is_feasible(less, Budgets.of(less, settings))


def least_budget(sheet: Sheet, settings: Settings, knob: str, enough: int) -> int:
    """Bytes of the smallest ``budget`` or ``host_budget`` with a plan: ``enough``, of a stand-by, or what is less.

    To a thousandth of what is asked for in addition; where ``enough`` has no plan within the other budget, it is that.
    """
    # As it is asked: whether the norm goes by tiles is decided for each budget.
    sheet = sheet.at(sheet.lengths)
    budgets = Budgets.of(sheet, settings)
    asked = budgets.host if knob == "host_budget" else budgets.device or 0
    between = max(0, enough - asked)

    def at(steps: int) -> int:
        return asked + between * steps // _BUDGET_STEPS

    def is_short(steps: int) -> bool:
        return not is_feasible(sheet, _with_budget(settings, knob, at(steps)))

    return at(largest(is_short, _BUDGET_STEPS) + 1)


def _with_budget(settings: Settings, knob: str, size_bytes: int) -> Settings:
    if knob == "host_budget":
        return replace(settings, host_budget=size_bytes)
    return replace(settings, budget=size_bytes)


def for_device(
    sheet: Sheet, settings: Settings, tried: Sequence[Choices], words: PythonWords
) -> list[Suggestion]:
    """What to do about a device budget that no plan of ``tried`` keeps."""
    return [
        *_shorter_tile(sheet, settings, words),
        *_lengths(sheet, settings, words),
        *_budgets(sheet, settings, tried, words),
        *_knobs(sheet, settings, words),
    ]


def for_host(
    sheet: Sheet, settings: Settings, tried: Sequence[Choices], words: PythonWords, needed: int
) -> list[Suggestion]:
    """What to do about a host budget that no plan of ``tried`` keeps; ``needed``: the least that would do."""
    return [
        *_alphas(sheet, settings, words),
        *_lengths(sheet, settings, words),
        *_raised(sheet, settings, words, "host_budget", needed),
        *_budgets(sheet, settings, tried, words),
        *_more_kept(sheet, settings, words),
        *_knobs(sheet, settings, words),
    ]


def longest_that_fits(sheet: Sheet, settings: Settings) -> int:
    """Tokens of the longest sequence below the asked one for which a plan exists, in whole granules; or 0."""
    asked = max(sheet.lengths, default=0)
    if asked < 2:
        return 0
    step = granule(asked)
    return step * largest(
        lambda count: is_feasible(sheet.at(in_proportion(sheet.lengths, count * step)), settings),
        -(-asked // step),
    )


def _planned(sheet: Sheet, settings: Settings) -> tuple[Sheet, Decision | None]:
    try:
        return decide_somehow(sheet, settings)
    except MemoError:
        # A suggestion that raises (strict, a knob that does not go with this model) is not made.
        return sheet, None


def _checked(sheet: Sheet, settings: Settings, text: str) -> Iterator[Suggestion]:
    """The suggestion, if a whole plan for it exists."""
    # As it is asked: whether the norm goes by tiles is decided for each suggestion.
    sheet, decision = _planned(sheet.at(sheet.lengths), settings)
    if decision is not None:
        yield Suggestion(text, sheet.peak_bytes(decision.choices), sheet.host_bytes(decision.choices))


def _lengths(sheet: Sheet, settings: Settings, words: PythonWords) -> Iterator[Suggestion]:
    longest = longest_that_fits(sheet, settings)
    if longest:
        shorter = sheet.at(in_proportion(sheet.lengths, longest))
        text = words.length(longest, max(sheet.lengths))
        several = len(set(sheet.lengths) - {0}) > 1
        yield from _checked(shorter, settings, f"{text}, shorter sequences in proportion" if several else text)


def _budgets(
    sheet: Sheet, settings: Settings, tried: Sequence[Choices], words: PythonWords
) -> Iterator[Suggestion]:
    """The smallest device budget under which a plan keeps the host's; no more than the device has."""
    budgets = Budgets.of(sheet, settings)
    needs = [sheet.peak_bytes(c) for c in tried if not budgets.over_host(sheet.host_bytes(c))]
    if needs:
        least = least_budget(sheet, settings, "budget", min(needs))
        if sheet.profile.device_type == "cpu" or least <= sheet.profile.device_bytes:
            yield from _raised(sheet, settings, words, "budget", least)


def _raised(sheet: Sheet, settings: Settings, words: PythonWords, knob: str, least: int) -> Iterator[Suggestion]:
    raised = _with_budget(settings, knob, parse_bytes(size_at_least(least)))
    yield from _checked(sheet, raised, words.size(knob, least))


def _alphas(sheet: Sheet, settings: Settings, words: PythonWords) -> Iterator[Suggestion]:
    """The largest swap fraction below the asked one."""
    asked = 1.0 if settings.policy is Policy.SWAP else settings.alpha
    if asked is None:
        return
    policy = Policy.MEMO if settings.policy is Policy.SWAP else settings.policy

    def at(steps: int) -> Settings:
        return replace(settings, policy=policy, alpha=steps / _ALPHA_STEPS)

    steps = largest(lambda steps: is_feasible(sheet, at(steps)), max(1, -int(-asked * _ALPHA_STEPS // 1)))
    text = words.together(words.setting("policy", policy.value), words.setting("alpha", steps / _ALPHA_STEPS))
    yield from _checked(sheet, at(steps), text)


def _more_kept(sheet: Sheet, settings: Settings, words: PythonWords) -> Iterator[Suggestion]:
    """The fewest blocks whose staying on the device makes the rest fit the host."""
    if settings.policy is Policy.NONE or (settings.policy is Policy.AUTO and settings.keep_last is None):
        return
    most = min(Counter(block.stack for block in sheet.blocks).values(), default=0)
    for count in range((settings.keep_last or 0) + 1, most + 1):
        kept = replace(settings, keep_last=count)
        if is_feasible(sheet, kept):
            yield from _checked(sheet, kept, words.setting("keep_last", count))
            return


def _shorter_tile(sheet: Sheet, settings: Settings, words: PythonWords) -> Iterator[Suggestion]:
    """The first half, quarter, ... of the asked tile that fits."""
    tile = (settings.tile or 0) // 2
    while tile:
        shorter = replace(settings, tile=tile)
        if is_feasible(sheet, shorter):
            yield from _checked(sheet, shorter, f"{words.setting('tile', tile)} instead of {settings.tile}")
            return
        tile //= 2


def _knobs(sheet: Sheet, settings: Settings, words: PythonWords) -> Iterator[Suggestion]:
    """Other settings of the same request."""
    if settings.policy is not Policy.NONE and settings.keep_last != 0:
        yield from _checked(sheet, replace(settings, keep_last=0), words.setting("keep_last", 0))
    for policy in (Policy.RECOMPUTE, Policy.AUTO):
        if settings.policy is not policy:
            other = replace(settings, policy=policy, alpha=None, tile=None)
            # Neither policy takes what was given of these: it has to go with the change.
            given = [name for name in ("alpha", "tile") if getattr(settings, name) is not None]
            yield from _checked(sheet, other, words.without(words.setting("policy", policy.value), *given))
