"""How long a sequence a machine trains, what a step costs on the way there, and what stands in the way.

The model is looked at once (``Study``); every length is then planned, as a run would plan it. A length fits where there
is a plan within both budgets; the longest is found by bisection, in whole granules of every GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from memo_runtime.config import Settings
from memo_runtime.errors import ArgumentError, PlanInfeasibleError
from memo_runtime.offline.optimizers import OPTIMIZERS
from memo_runtime.offline.planning import is_feasible_at, plan_at, seconds_at
from memo_runtime.offline.profile import Study
from memo_runtime.planning.rounding import GRANULE_TOKENS
from memo_runtime.planning.search import largest
from memo_runtime.records import Plan
from memo_runtime.units import format_bytes

#: Granules of the shortest sequence that is tried, and of the longest, of each GPU.
_FEWEST, _MOST = 8, 1 << 20
#: Lengths shown: the longest, and powers of two below it.
_SHOWN = 6
#: A budget that holds anything.
_UNLIMITED = 1 << 60
#: Share of a step below which more memory is no gain.
_GAIN = 0.01
#: Gradients are a smaller share of the parameters where most of those are frozen already.
_FROZEN = 0.1


class Bound(StrEnum):
    """What keeps a step from being faster, or, of the longest, from being longer."""

    TIME = "time"  # more memory makes it no faster
    HBM = "HBM"
    HOST = "host"
    BOTH = "HBM and host"  # one of the two alone is no help
    POSITIONS = "positions"  # the model has no more
    RANGE = "search"  # the search goes no further


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """A length that trains, and its plan."""

    tokens: int
    plan: Plan
    bound: Bound

    @property
    def executors(self) -> str:
        """How its blocks run, the most frequent first."""
        names = [block.executor.value for block in self.plan.blocks]
        return "+".join(sorted(dict.fromkeys(names), key=lambda name: -names.count(name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The frontier, from shorter to longer; the last is the longest that trains."""

    reaches: tuple[Reach, ...]

    @property
    def longest(self) -> Reach:
        """The longest."""
        return self.reaches[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """Lengths in granules of all GPUs; ``host_bytes``: of the node."""

    study: Study
    settings: Settings
    host_bytes: int | None

    @property
    def unit(self) -> int:
        return GRANULE_TOKENS * self.study.ranks.gpus

    @property
    def most(self) -> int:
        """Granules beyond which nothing is tried."""
        subject = self.study.subject
        if subject.learned_positions and subject.positions is not None:
            return min(_MOST, subject.positions // self.unit)
        return _MOST

    def fits(self, granules: int, *, device: bool = True, host: bool = True) -> bool:
        """There is a plan; limits that are not ``device`` or ``host`` are lifted."""
        settings, host_bytes = self._lifted(device=device, host=host)
        return is_feasible_at(self.study.at(granules * self.unit, host_bytes=host_bytes), settings)

    def plan(self, granules: int) -> Plan:
        return plan_at(self.study.at(granules * self.unit, host_bytes=self.host_bytes), self.settings)

    def seconds(self, granules: int, *, device: bool, host: bool) -> float:
        settings, host_bytes = self._lifted(device=device, host=host)
        return seconds_at(self.study.at(granules * self.unit, host_bytes=host_bytes), settings)

    def _lifted(self, *, device: bool, host: bool) -> tuple[Settings, int | None]:
        settings = self.settings if device else replace(self.settings, budget=_UNLIMITED)
        return settings, self.host_bytes if host else _UNLIMITED * self.study.ranks.gpus

    def longest(self) -> int:
        """0: not even the shortest fits."""
        fewest = min(_FEWEST, self.most)
        if not fewest or not self.fits(fewest):
            return 0
        high = fewest
        while high < self.most:
            low, high = high, min(2 * high, self.most)
            if not self.fits(high):
                return self._between(low, high)
        return high

    def _between(self, low: int, high: int) -> int:
        """The most that fit, where ``low`` do and ``high`` do not."""
        return low + largest(lambda more: self.fits(low + more), high - low)

    def bound_of_longest(self, granules: int) -> Bound:
        """What stands against one granule more."""
        if granules >= self.most:
            return Bound.RANGE if granules == _MOST else Bound.POSITIONS
        if self.fits(granules + 1, host=False):
            return Bound.HOST
        return Bound.HBM if self.fits(granules + 1, device=False) else Bound.BOTH

    def bound(self, granules: int, plan: Plan) -> Bound:
        """What would make the step of ``plan`` faster."""

        def gains(*, device: bool, host: bool) -> float:
            return 1.0 - self.seconds(granules, device=device, host=host) / max(plan.forecast.step_seconds, 1e-12)

        most = gains(device=False, host=False)
        if most < _GAIN:
            return Bound.TIME
        return Bound.HBM if gains(device=True, host=False) < most / 2 else Bound.HOST


def fit(
    study: Study,
    settings: Settings,
    *,
    host_bytes: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Fit:
    """The lengths that train within ``settings``, up to the longest.

    What a rehearsal checks on a device are these: each ``Reach`` has the plan that a run would make.

    Args:
        host_bytes: of the whole node. progress: told what is done next.

    Raises:
        ArgumentError: a table of positions with less than one granule of each GPU.
        PlanInfeasibleError: not even the shortest fits; says what would, and which optimizers.
    """
    search = _Search(study=study, settings=settings, host_bytes=host_bytes)
    if not search.most:
        raise ArgumentError(
            f"{study.subject.name} learns {study.subject.positions:,} positions, and lengths are searched in steps of "
            f"{search.unit:,} tokens: give --max-positions for a longer table (a factory makes its own), or "
            "memo plan --seq-len one length"
        )
    progress("the longest that fits")
    longest = search.longest()
    if not longest:
        raise _with_optimizers(search)
    found = []
    for granules in _shown(longest):
        progress(f"{granules * search.unit:,} tokens")
        plan = search.plan(granules)
        bound = search.bound_of_longest(granules) if granules == longest else search.bound(granules, plan)
        found.append(Reach(tokens=granules * search.unit, plan=plan, bound=bound))
    return Fit(reaches=tuple(found))


def _shown(longest: int) -> Iterator[int]:
    """Powers of two below the longest, and it."""
    powers = [1 << exponent for exponent in range(longest.bit_length()) if _FEWEST <= 1 << exponent < longest]
    yield from powers[1 - _SHOWN :]
    yield longest


def _with_optimizers(search: _Search) -> PlanInfeasibleError:
    """The error for the shortest length, with the optimizers under which it would fit."""
    shortest = min(_FEWEST, search.most)
    try:
        search.plan(shortest)
    except PlanInfeasibleError as error:
        study = search.study
        asked = study.optimizer.name if study.optimizer is not None else "adamw"
        fitting = [
            one.name
            for one in OPTIMIZERS.values()
            if one.name != asked and replace(search, study=replace(study, optimizer=one)).fits(shortest)
        ]
        said = f"--optimizer {', '.join(fitting)} instead of {asked}"
        if not fitting:
            parameters, gradients = study.states.parameters, study.states.gradients
            alone = format_bytes((parameters + gradients) // study.ranks.gpus)
            freeze = "--lora or --trainable freezes most of them, " if gradients >= _FROZEN * parameters else ""
            said = f"no other either: parameters and gradients are {alone}; {freeze}more --gpus share them"
        return type(error)(f"{error}\n  optimizer  {said}, at {shortest * search.unit:,} tokens")
    raise AssertionError("what is feasible was planned")
