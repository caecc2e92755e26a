"""The arithmetic of one profile at given lengths: choices in, exact totals out.

A model has many blocks and few kinds of blocks. The sheet works out each distinct (kind, choice) once, so
that planners and error messages can ask for hundreds of plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from memo_runtime.errors import MemoError
from memo_runtime.planning.actions import plan_block
from memo_runtime.planning.footprint import Footprint, footprint
from memo_runtime.planning.forecast import Course, Surroundings, run_course
from memo_runtime.records import BlockPlan, BlockProfile, Executor, Forecast, Profile


class PlanRequestError(MemoError, ValueError):
    """What was asked of the planner does not go with the profile or with what is built."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What is decided for one block."""

    executor: Executor
    prefix: int = 0
    device_rows: int = 0
    reason: str = ""
    tile: int = 0
    resident: bool = False
    sent: int = 0
    groups: int = 1
    from_below: bool = False
    for_above: bool = False
    late: bool = False
    passes: int = 0


#: The choice that leaves a block alone.
KEEP = Choice(Executor.KEEP)


@dataclass(frozen=True, slots=True)
class Totals:
    """A step under some choices: its blocks' plans and its forecast."""

    plans: tuple[BlockPlan, ...]
    forecast: Forecast


def lengths_of(profile: Profile, tokens: Mapping[int, int] | None) -> tuple[int, ...]:
    """Sequence length of every block: as profiled, or by stack as asked.

    Raises:
        PlanRequestError: a stack that does not exist, or a length below 1.
    """
    asked = dict(tokens or {})
    stacks = sorted({block.stack for block in profile.blocks})
    unknown = sorted(set(asked) - set(stacks))
    if unknown:
        raise PlanRequestError(f"tokens= names stack {unknown[0]}; the profile has stacks {stacks}")
    for stack, length in asked.items():
        if isinstance(length, bool) or length < 1:
            raise PlanRequestError(f"tokens={{{stack}: {length!r}}} is not a length: give at least 1 token")
    return tuple(
        block.tokens if block.tokens == 0 else asked.get(block.stack, block.tokens) for block in profile.blocks
    )


@dataclass(slots=True)
class Sheet:
    """Totals of ``profile`` where block i is given ``lengths[i]`` tokens.

    ``accumulating``: of steps that start with gradients already there.
    """

    profile: Profile
    lengths: tuple[int, ...]
    kinds: tuple[int, ...] = ()
    accumulating: bool = False
    around: Surroundings = field(init=False)
    _known: dict[tuple[int, int, Choice], tuple[BlockPlan, Footprint]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.around = Surroundings.of(
            self.profile, self.lengths[-1] if self.lengths else 0, accumulating=self.accumulating
        )
        self.kinds = self.kinds or kinds_of(self.profile.blocks)

    def at(self, lengths: tuple[int, ...]) -> Sheet:
        """The same profile at other lengths."""
        return Sheet(self.profile, lengths, self.kinds, self.accumulating)

    def where(self, *, accumulating: bool) -> Sheet:
        """The same lengths in steps that start with gradients, or without."""
        return Sheet(self.profile, self.lengths, self.kinds, accumulating)

    @property
    def blocks(self) -> tuple[BlockProfile, ...]:
        """The blocks in call order."""
        return self.profile.blocks

    def kind(self, index: int) -> tuple[int, int]:
        """Equal for blocks that differ in nothing but their name."""
        return self.kinds[index], self.lengths[index]

    def one(self, index: int, choice: Choice) -> tuple[BlockPlan, Footprint]:
        """Plan and footprint of block ``index``; the plan may carry the name of another block of its kind."""
        key = (*self.kind(index), choice)
        found = self._known.get(key)
        if found is None:
            block = self.blocks[index]
            plan = plan_block(
                block,
                choice.executor,
                self.lengths[index],
                choice.prefix,
                choice.device_rows,
                reason=choice.reason,
                tile=choice.tile,
                resident=choice.resident,
                sent=choice.sent,
                groups=choice.groups,
                from_below=choice.from_below,
                for_above=choice.for_above,
                late=choice.late,
                passes=choice.passes,
            )
            found = self._known[key] = plan, footprint(block, plan, self.profile.link)
        return found

    def footprints(self, choices: Sequence[Choice]) -> list[Footprint]:
        """Footprint of every block."""
        return [self.one(index, choice)[1] for index, choice in enumerate(choices)]

    def plans(self, choices: Sequence[Choice]) -> tuple[BlockPlan, ...]:
        """Plan of every block, under its own name."""
        return tuple(
            replace(self.one(index, choice)[0], name=self.blocks[index].name) for index, choice in enumerate(choices)
        )

    def course(self, choices: Sequence[Choice]) -> Course:
        """The highest points of the step."""
        return run_course(self.around, self.footprints(choices))

    def peak_bytes(self, choices: Sequence[Choice]) -> int:
        """Device bytes at the highest point of the step."""
        return self.around.base_bytes + self.course(choices).device_peak

    def host_bytes(self, choices: Sequence[Choice]) -> int:
        """Host memory of the step, with the alignment of every slot."""
        return sum(self.one(index, choice)[0].host_bytes for index, choice in enumerate(choices))

    def forecast(self, choices: Sequence[Choice]) -> Forecast:
        """Every total of the step."""
        plans = [self.one(index, choice)[0] for index, choice in enumerate(choices)]
        return self.around.forecast(plans, self.footprints(choices))


def kinds_of(blocks: Sequence[BlockProfile]) -> tuple[int, ...]:
    """A number per block, equal for blocks that differ in nothing but their name."""
    kinds: dict[BlockProfile, int] = {}
    return tuple(kinds.setdefault(replace(block, name=""), len(kinds)) for block in blocks)
