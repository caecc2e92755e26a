"""Whether the numbers of a profile or plan can be true: what types alone do not say.

A file may have been cut, merged or edited by hand. Everything that can be told without the model is looked at:

    every number    not negative (but polynomial coefficients and results of operators), finite (but link rates)
    indices         within the lists that they point into
    a block's plan  device_rows <= prefix <= tokens (by tiles device_rows are none or all), an action for each group,
                    named as in the profile; what is sent is of its prefix, less whole tiles that stay; groups
                    divide the heads; an input that is made again has a block below for that
    a placement     rows have bytes and time, and no two that are alive together share a byte

and before a plan is executed, that its actions and bytes are those that follow from its profile.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from memo_runtime.config import Policy
from memo_runtime.placement import PlacedRequest
from memo_runtime.planning.actions import plan_block
from memo_runtime.planning.chain import wrong_late, wrong_link
from memo_runtime.records import (
    BlockPlan,
    BlockProfile,
    Bundle,
    Executor,
    Growth,
    Link,
    Pin,
    Plan,
    Profile,
    TiledProfile,
)

_MAX_INT = 2**63 - 1
_MAX_FLOAT = 1e300
#: (record, field) with another least value than 0; None: any.
_LEAST: dict[tuple[type, str], int | None] = {
    (Growth, "constant"): None,
    (Growth, "linear"): None,
    (Growth, "quadratic"): None,
    (Growth, "multiple"): 1,
    (Pin, "number"): None,
    (Profile, "rows"): 1,
    (Plan, "gpus"): 1,
    (TiledProfile, "heads"): 1,
    (BlockPlan, "groups"): 1,
}


@dataclass(frozen=True, slots=True)
class Fault:
    """A field that cannot be true: where it is, what it holds, and what would be right."""

    where: str
    value: Any
    expected: str


def find_fault(value: Plan | Profile) -> Fault | None:
    """The first field of ``value`` that cannot be true; None if all can."""
    return next(_faults(value), None)


def find_deviation(plan: Plan) -> Fault | None:
    """The first number of a sound ``plan`` that does not follow from its profile; None if all do."""
    for index, (block, planned) in enumerate(zip(plan.profile.blocks, plan.blocks, strict=True)):
        follows = plan_block(
            block, planned.executor, planned.tokens, planned.prefix, planned.device_rows,
            reason=planned.reason, tile=planned.tile, resident=planned.resident, sent=planned.sent,
            groups=planned.groups, from_below=planned.from_below, for_above=planned.for_above,
            late=planned.late, passes=planned.passes, mixer_inputs=planned.mixer_inputs,
        )  # fmt: skip
        for field in fields(BlockPlan):
            has, right = getattr(planned, field.name), getattr(follows, field.name)
            if has == right:
                continue
            where = f"blocks[{index}].{field.name}"
            if isinstance(has, tuple):
                position = next(i for i, (one, other) in enumerate(zip(has, right, strict=True)) if one != other)
                where, has, right = f"{where}[{position}]", has[position].value, right[position].value
            return Fault(where, has, f"{right}, which follows from the profile in the plan")
    return None


def _faults(value: Plan | Profile) -> Iterator[Fault]:
    yield from _numbers(value, "")
    profile, at = (value.profile, "profile.") if isinstance(value, Plan) else (value, "")
    yield from _profile_faults(profile, at)
    if isinstance(value, Plan):
        yield from _plan_faults(value)


def _numbers(record: Any, where: str) -> Iterator[Fault]:
    """Numbers of ``record`` and of the records in it that are out of range."""
    for field in fields(record):
        value = getattr(record, field.name)
        path = f"{where}.{field.name}" if where else field.name
        for index, item in enumerate(value) if isinstance(value, tuple) else [(None, value)]:
            at = path if index is None else f"{path}[{index}]"
            if is_dataclass(item):
                yield from _numbers(item, at)
            elif isinstance(item, (int, float)) and not isinstance(item, (bool, Enum)):
                expected = _out_of_range(type(record), field.name, item)
                if expected:
                    yield Fault(at, item, expected)


def _out_of_range(record: type, name: str, value: float) -> str:
    """What is expected of field ``name`` of ``record`` where ``value`` is not it; empty where it is."""
    if record is Link:
        return "" if 0 < value <= _MAX_INT or value == float("inf") else "a rate above 0"
    if record is Plan and name == "alpha":
        return "" if 0 <= value <= 1 else "a fraction from 0 to 1"
    least = _LEAST.get((record, name), 0)
    if not -_MAX_FLOAT < value < _MAX_FLOAT:
        return "a finite number"
    if isinstance(value, int) and abs(value) > _MAX_INT and record is not Growth:
        return "a number below 2^63"
    return "" if least is None or value >= least else f"{least} or more"


def _profile_faults(profile: Profile, at: str) -> Iterator[Fault]:
    if not profile.blocks:
        yield Fault(f"{at}blocks", [], "at least one block")
    names: set[str] = set()
    longest = max((block.tokens for block in profile.blocks), default=0)
    for name in ("shared", "outside_forward", "entry", "outside_peak", "loss_peak", "result", "outside_seconds"):
        yield from _negative(getattr(profile, name), longest, f"{at}{name}")
    if profile.long_end is not None:
        for name in ("outside_peak", "loss_peak"):
            yield from _negative(getattr(profile.long_end, name), longest, f"{at}long_end.{name}")
    for index, block in enumerate(profile.blocks):
        where = f"{at}blocks[{index}]"
        if block.name in names:
            yield Fault(f"{where}.name", block.name, "a name of its own: another block has it too")
        names.add(block.name)
        yield from _block_faults(block, where)


def _block_faults(block: BlockProfile, where: str) -> Iterator[Fault]:
    groups, saved = len(block.groups), len(block.saved)
    for index, tensor in enumerate(block.saved):
        yield from _beyond(tensor.group, groups, f"{where}.saved[{index}].group", "groups")
    for index, pin in enumerate(block.pins):
        yield from _beyond(pin.group, groups, f"{where}.pins[{index}].group", "groups")
        yield from _beyond(pin.saved, saved, f"{where}.pins[{index}].saved", "saved")
    for index, group in enumerate(block.groups):
        yield from _negative(group.size, block.tokens, f"{where}.groups[{index}].size")
        if group.storage is not None:
            yield from _negative(group.storage.size, block.tokens, f"{where}.groups[{index}].storage.size")
        for field in fields(Bundle) if group.bundle is not None else ():
            size = getattr(group.bundle, field.name)
            yield from _negative(size, block.tokens, f"{where}.groups[{index}].bundle.{field.name}")
    for field in fields(BlockProfile):
        value = getattr(block, field.name)
        if isinstance(value, Growth):
            yield from _negative(value, block.tokens, f"{where}.{field.name}")


def _beyond(index: int | None, length: int, where: str, of: str) -> Iterator[Fault]:
    if index is not None and index >= length:
        yield Fault(where, index, f"less than {length}, the number of {of} of this block")


def _negative(growth: Growth, tokens: int, where: str) -> Iterator[Fault]:
    """Coefficients may be negative, what they give at the planned length may not."""
    value = growth.exact(tokens)
    if not 0 <= value < _MAX_FLOAT:
        yield Fault(where, value, f"0 or more at {tokens:,} tokens")


def _placement_faults(rows: Sequence[PlacedRequest]) -> Iterator[Fault]:
    """Rows without bytes or time, and rows that share a byte while both are alive."""
    for index, row in enumerate(rows):
        if not row.size:
            yield Fault(f"placement[{index}].size", row.size, "1 or more")
        if row.upper <= row.lower:
            yield Fault(f"placement[{index}].upper", row.upper, f"more than {row.lower}, its lower")
    # At every event what ends goes first. Neighbours by address are enough: those alive before do not overlap.
    events = sorted(
        (tick, begins, index)
        for index, row in enumerate(rows)
        for tick, begins in ((row.lower, True), (row.upper, False))
    )
    alive: list[tuple[int, int]] = []
    for _, begins, index in events:
        row = rows[index]
        at = bisect_left(alive, (row.offset, index))
        if not begins:
            del alive[at]
            continue
        for _, other in alive[max(0, at - 1) : at + 1]:
            near = rows[other]
            if near.offset < row.offset + row.size and row.offset < near.offset + near.size:
                yield Fault(f"placement[{index}].offset", row.offset, f"another byte than those of placement[{other}]")
        alive.insert(at, (row.offset, index))


def _plan_faults(plan: Plan) -> Iterator[Fault]:
    yield from _placement_faults(plan.placement)
    policies = [policy.value for policy in Policy]
    if plan.policy not in policies:
        yield Fault("policy", plan.policy, f"one of {', '.join(policies)}")
    blocks = plan.profile.blocks
    if len(plan.blocks) != len(blocks):
        yield Fault("blocks", f"a list of {len(plan.blocks)}", f"{len(blocks)}, as many as profile.blocks")
    for index, (block, planned) in enumerate(zip(blocks, plan.blocks, strict=False)):
        where = f"blocks[{index}]"
        if planned.name != block.name:
            yield Fault(f"{where}.name", planned.name, f'"{block.name}", as profile.blocks[{index}].name')
        if bool(planned.tokens) != bool(block.tokens):
            yield Fault(f"{where}.tokens", planned.tokens, "0" if planned.tokens else "1 or more, as in the profile")
        if planned.prefix > planned.tokens:
            yield Fault(f"{where}.prefix", planned.prefix, f"at most {planned.tokens}, its tokens")
        if len(planned.actions) != len(block.groups):
            count = f"a list of {len(planned.actions)}"
            yield Fault(f"{where}.actions", count, f"{len(block.groups)}, as many as profile.blocks[{index}].groups")
        tiled = planned.executor is Executor.TILED
        rows = planned.device_rows
        if tiled and rows not in (0, planned.tokens):
            yield Fault(f"{where}.device_rows", rows, f"0 or {planned.tokens}, its tokens")
        if not tiled and rows > planned.prefix:
            yield Fault(f"{where}.device_rows", rows, f"at most {planned.prefix}, its prefix")
        heads = block.tiled.heads if tiled and block.tiled is not None else 1
        if heads % planned.groups:
            yield Fault(f"{where}.groups", planned.groups, _groups_of(heads))
        if wrong := _wrong_sent(planned):
            yield Fault(f"{where}.sent", planned.sent, wrong)
        if planned.mixer_inputs and (not tiled or planned.groups > 1 or planned.late):
            yield Fault(f"{where}.mixer_inputs", True, "false: it runs by groups of heads, late, or not by tiles")
        for wrong in [wrong_link(blocks, plan.blocks, index)] if len(plan.blocks) == len(blocks) else []:
            if wrong:
                yield Fault(f"{where}.from_below", planned.from_below, wrong)
        field, wrong = wrong_late(plan.blocks, index)
        if wrong:
            yield Fault(f"{where}.{field}", getattr(planned, field), wrong)
        if planned.for_above and not any(one.from_below for one in plan.blocks[index + 1 : index + 2]):
            yield Fault(f"{where}.for_above", True, "false: the block above does not say from_below")
        if tiled and block.tiled is None:
            yield Fault(f"{where}.executor", planned.executor.value, "another one: the profile says nothing of tiles")
        if tiled != bool(planned.tile):
            yield Fault(f"{where}.tile", planned.tile, "1 or more" if tiled else f"0 for executor {planned.executor}")
        if planned.executor is not Executor.NATIVE and not block.tokens:
            yield Fault(f"{where}.executor", planned.executor.value, "native: its input was not found")


def _groups_of(heads: int) -> str:
    if heads == 1:
        return "1: its attention does not run by groups of heads"
    return f"a number that divides {heads}, the heads that its attention can be divided into"


def _wrong_sent(planned: BlockPlan) -> str:
    """What is expected of the rows whose products are sent; empty where they can be."""
    if not planned.sent:
        return ""
    if planned.executor is not Executor.TILED or planned.device_rows:
        return "0 where the block does not run by tiles, or its stash stays on the device"
    if planned.sent > planned.prefix:
        return f"at most {planned.prefix}, its prefix"
    if planned.tile and (planned.prefix - planned.sent) % planned.tile:
        return f"{planned.prefix} less a multiple of {planned.tile}, its tile"
    return ""
