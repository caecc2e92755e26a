"""Storages that saved tensors leave room in, or share: left as it is, a slice of a projection holds all of it.

How much that is at other lengths is seen in runs at shorter ones, since it need not grow as what is saved of it does
(the first token of a sequence).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import torch

from memo_runtime.blocks.pins import PinKey
from memo_runtime.blocks.rerun import storage_key
from memo_runtime.profiling.growth import fit_counts, polynomial_bytes, times
from memo_runtime.profiling.observe import Observation, OperatorRecord
from memo_runtime.profiling.trial import Trial
from memo_runtime.records import Growth, Pin, Role, SavedTensor, Storage, TensorGroup

#: What a block is given is its maker's, and a call that is made up has other storages than a caller's.
_FROM_OUTSIDE = (Role.PARAMETER, Role.SHARED, Role.INPUT)


def with_storages(
    groups: Sequence[TensorGroup], saved: Sequence[SavedTensor], whole: Observation, tokens: int
) -> list[TensorGroup]:
    """``groups`` of a run at ``tokens`` with the storages that they share or do not fill, as large as there."""
    found: list[TensorGroup] = list(groups)
    inside: dict[int, list[int]] = {}
    first = _first(saved)
    for number, index in sorted(first.items()):
        if found[number].role not in _FROM_OUTSIDE and whole.saved[index].numel():
            inside.setdefault(storage_key(whole.saved[index]), []).append(number)
    for numbers in inside.values():
        size_bytes = whole.saved[first[numbers[0]]].untyped_storage().nbytes()
        if len(numbers) > 1 or found[numbers[0]].size.at(tokens) < size_bytes:
            storage = Storage(number=numbers[0], size=Growth(constant=size_bytes))
            for number in numbers:
                found[number] = replace(found[number], storage=storage)
    return found


def at_length(groups: Sequence[TensorGroup], tokens: int) -> list[TensorGroup]:
    """``groups`` with their storages as large as at ``tokens``, where ``with_storages`` saw them."""
    return [
        replace(group, storage=replace(group.storage, size=Growth(constant=group.storage.size.at(tokens))))
        if group.storage is not None
        else group
        for group in groups
    ]


def with_growth(
    groups: Sequence[TensorGroup], saved: Sequence[SavedTensor], pins: Sequence[Pin], runs: Sequence[Trial]
) -> list[TensorGroup]:
    """``groups``, whose storages are those of the last of ``runs``, with how they grow."""
    first, found = _first(saved), list(groups)
    alike = [run for run in runs if len(run.whole.saved) == len(saved)]
    for number, group in enumerate(groups):
        if group.storage is not None:
            at = group.storage.number
            found[number] = replace(group, storage=Storage(number=at, size=_growth(groups[at], first[at], alike)))
        elif number in first and not group.splits and group.role not in _FROM_OUTSIDE:
            found[number] = replace(group, size=_seen(group, [(run, run.whole.saved[first[number]]) for run in alike]))
    operators = [(run, run.whole.by_key()) for run in alike]
    for pin in pins:
        if pin.group is not None and pin.saved is None and not found[pin.group].splits:
            group = found[pin.group]
            if group.role not in _FROM_OUTSIDE:
                found[pin.group] = replace(group, size=_seen(group, list(_pinned(pin, operators))))
    return found


def _pinned(
    pin: Pin, operators: Sequence[tuple[Trial, Mapping[PinKey, OperatorRecord]]]
) -> Iterator[tuple[Trial, torch.Tensor]]:
    """The tensor of ``pin`` in each run."""
    for run, records in operators:
        record = records.get((pin.op, pin.call))
        value = record.pin_values().get(pin.output) if record is not None else None
        if isinstance(value, torch.Tensor):
            yield run, value


def _seen(group: TensorGroup, tensors: Sequence[tuple[Trial, torch.Tensor]]) -> Growth:
    """How ``group``, which was one of ``tensors`` in each run, grows where its dimensions do not say: padded by a few.

    As they say where the tensor is not all of the group, or is longer by another number of tokens in each run (padded
    to a multiple): what a curve through such points says of other lengths may be anything.
    """
    points = [(run.lengths.whole, tensor.numel() * tensor.element_size()) for run, tensor in tensors]
    if len(points) < 2 or points[-1][1] != group.size.at(points[-1][0]):
        return group.size
    if all(group.size.at(tokens) == count for tokens, count in points):
        return group.size
    (x0, y0), (x1, y1) = points[0], points[-1]
    each = Fraction(y1 - y0, x1 - x0) if x1 != x0 else Fraction(0)
    more = y1 - each * x1
    padded = each > 0 and more >= 0 and (more / each).denominator == 1
    if not (padded and all(each * tokens + more == count for tokens, count in points)):
        # No dimension is the tokens' own, and it grows with them all the same.
        alone = y1 > y0 and not group.size.linear and not group.size.quadratic
        return polynomial_bytes(y1, x1, 1) if alone else group.size
    return Growth(constant=int(more), linear=int(each) if each.denominator == 1 else float(each))


def _growth(part: TensorGroup, index: int, runs: Sequence[Trial]) -> Growth:
    """Of the storage that ``part``, saved tensor number ``index``, lies in."""
    points = [(run.lengths.whole, run.whole.saved[index].untyped_storage().nbytes()) for run in runs]
    if len(points) > 1:
        return fit_counts(points)
    tokens, size_bytes = points[-1]
    share = Fraction(size_bytes, part.size.at(tokens))
    return replace(times(part.size, share), constant=float(part.size.constant * share))


def _first(saved: Sequence[SavedTensor]) -> dict[int, int]:
    """By group, the first saved tensor in it."""
    return {one.group: one.index for one in reversed(saved)}
