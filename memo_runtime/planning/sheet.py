"""The arithmetic of one profile at given lengths: choices in, exact totals out.

A model has many blocks and few kinds of blocks. The sheet works out each distinct (kind, choice) once, and walks
through each distinct step once, so that planners and error messages can ask for thousands of plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from memo_runtime.errors import MemoError
from memo_runtime.planning.actions import plan_block
from memo_runtime.planning.footprint import Footprint, footprint
from memo_runtime.planning.forecast import Course, Surroundings, bytes_at_head, run_course, step_seconds
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
    mixer_inputs: bool = False


#: Plan and footprint of a block.
_One = tuple[BlockPlan, Footprint]

#: The choice that leaves a block alone.
KEEP = Choice(Executor.KEEP)


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


def in_proportion(lengths: Sequence[int], longest: int) -> tuple[int, ...]:
    """``lengths`` where the longest of them is ``longest``, and the others are as much shorter as they were."""
    most = max(lengths, default=0)
    return tuple([max(1, length * longest // most) if length else 0 for length in lengths])


@dataclass(slots=True)
class Sheet:
    """Totals of ``profile`` where block i is given ``lengths[i]`` tokens.

    ``accumulating``: of steps that start with gradients already there. ``norm_by_tiles``: the norm behind the blocks
    runs so, however short its state is; at other lengths that is asked anew.
    """

    profile: Profile
    lengths: tuple[int, ...]
    kinds: tuple[int, ...] = ()
    accumulating: bool = False
    norm_by_tiles: bool = False
    around: Surroundings = field(init=False)
    _known: dict[tuple[int, int, Choice], _One] = field(init=False, default_factory=dict)
    _courses: dict[tuple[int, ...], Course] = field(init=False, default_factory=dict)
    _seconds: dict[tuple[int, ...], float] = field(init=False, default_factory=dict)
    _latest: tuple[Sequence[Choice], list[_One]] = field(init=False, default=((), []))

    def __post_init__(self) -> None:
        tokens = self.lengths[-1] if self.lengths else 0
        self.around = Surroundings.of(
            self.profile, tokens, accumulating=self.accumulating, norm_by_tiles=self.norm_by_tiles
        )
        self.kinds = self.kinds or kinds_of(self.profile.blocks)

    def at(self, lengths: tuple[int, ...]) -> Sheet:
        """The same profile at other lengths."""
        return Sheet(self.profile, lengths, self.kinds, self.accumulating)

    def where(self, *, accumulating: bool) -> Sheet:
        """The same lengths in steps that start with gradients, or without."""
        return Sheet(self.profile, self.lengths, self.kinds, accumulating)

    def with_norm_by_tiles(self) -> Sheet | None:
        """The same where the norm behind the blocks runs by tiles, short as its state is; None: that is no help."""
        tokens = self.lengths[-1] if self.lengths else 0
        pairs = zip(self.profile.end(tokens, by_tiles=True), self.profile.end(tokens), strict=True)
        if self.norm_by_tiles or not any(by_tiles < as_it_is for by_tiles, as_it_is in pairs):
            return None
        return Sheet(self.profile, self.lengths, self.kinds, self.accumulating, norm_by_tiles=True)

    @property
    def blocks(self) -> tuple[BlockProfile, ...]:
        """The blocks in call order."""
        return self.profile.blocks

    def kind(self, index: int) -> tuple[int, int]:
        """Equal for blocks that differ in nothing but their name."""
        return self.kinds[index], self.lengths[index]

    def one(self, index: int, choice: Choice) -> _One:
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
                mixer_inputs=choice.mixer_inputs,
            )
            found = self._known[key] = plan, footprint(block, plan, self.profile.link)
        return found

    def footprints(self, choices: Sequence[Choice]) -> list[Footprint]:
        """Footprint of every block."""
        return [foot for _, foot in self._each(choices)]

    def plans(self, choices: Sequence[Choice]) -> tuple[BlockPlan, ...]:
        """Plan of every block, under its own name."""
        each = zip(self._each(choices), self.blocks, strict=True)
        return tuple(replace(plan, name=block.name) for (plan, _), block in each)

    def course(self, choices: Sequence[Choice]) -> Course:
        """The highest points of the step."""
        feet = self.footprints(choices)
        # Footprints live as long as this sheet, so that their ids stand for them.
        key = tuple(map(id, feet))
        found = self._courses.get(key)
        if found is None:
            found = self._courses[key] = run_course(self.around, feet)
        return found

    def step_seconds(self, choices: Sequence[Choice]) -> float:
        """Seconds of the step."""
        feet = self.footprints(choices)
        key = tuple(map(id, feet))
        found = self._seconds.get(key)
        if found is None:
            found = self._seconds[key] = step_seconds(self.around, feet)
        return found

    def peak_bytes(self, choices: Sequence[Choice]) -> int:
        """Device bytes at the highest point of the step."""
        return self.around.base_bytes + self.course(choices).device_peak

    def bytes_at_head(self, choices: Sequence[Choice]) -> int:
        """Device bytes while head and loss run, between forward and backward: at most those of the peak."""
        return self.around.base_bytes + bytes_at_head(self.around, self.footprints(choices))

    def host_bytes(self, choices: Sequence[Choice]) -> int:
        """Host memory of the step, with the alignment of every slot."""
        return sum(plan.host_bytes for plan, _ in self._each(choices))

    def forecast(self, choices: Sequence[Choice]) -> Forecast:
        """Every total of the step."""
        plans = [plan for plan, _ in self._each(choices)]
        course = self.course(choices)
        return Forecast(
            step_seconds=self.step_seconds(choices),
            peak_bytes=self.around.base_bytes + course.device_peak,
            host_bytes=sum(plan.host_bytes for plan in plans),
            bytes_to_host=sum(plan.bytes_to_host for plan in plans),
            bytes_to_device=sum(plan.bytes_to_device for plan in plans),
            bytes_kept=sum(plan.bytes_kept for plan in plans),
            recomputed_flops=sum(plan.recomputed_flops for plan in plans),
            stash_peak_bytes=course.stash_peak,
        )

    def _each(self, choices: Sequence[Choice]) -> list[_One]:
        """``one`` of every block. Most choices are one object for many blocks, which is then looked up by its id."""
        latest, found = self._latest
        if choices is latest:
            # Mostly several things are asked of one plan.
            return found
        known: dict[tuple[int, int, int], _One] = {}
        found = []
        for index, (kind, length, choice) in enumerate(zip(self.kinds, self.lengths, choices, strict=True)):
            key = kind, length, id(choice)
            one = known.get(key)
            if one is None:
                one = known[key] = self.one(index, choice)
            found.append(one)
        if isinstance(choices, tuple):
            self._latest = choices, found
        return found


def kinds_of(blocks: Sequence[BlockProfile]) -> tuple[int, ...]:
    """A number per block, equal for blocks that differ in nothing but their name."""
    kinds: dict[BlockProfile, int] = {}
    return tuple(kinds.setdefault(replace(block, name=""), len(kinds)) for block in blocks)
