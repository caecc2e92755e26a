"""What a block that is run again as a whole holds and copies, counted as execution does: by storage."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memo_runtime.blocks.grouping import Member
from memo_runtime.blocks.parcels import held_bytes, parcels_of
from memo_runtime.blocks.rerun import parameter_storages, storage_key
from memo_runtime.profiling.growth import fit_bytes
from memo_runtime.profiling.observe import dropped_saves
from memo_runtime.profiling.slicing import named_pins
from memo_runtime.profiling.trial import Subject, Trial
from memo_runtime.records import Bundle, Growth, PinKind, Role, TensorGroup
from memo_runtime.sizes import slot_bytes

#: (role, whether backward needs it) -> bytes that backward needs, and those of a ``Bundle`` in their order.
Counts = dict[tuple[Role, bool], tuple[int, ...]]
_PARTS = ("live", "copied", "slots", "gathered")


def bundles(subject: Subject, runs: Sequence[Trial]) -> tuple[TensorGroup, ...]:
    """Groups by role, from runs at several lengths, of which the last is the longest."""
    counts = [(run.lengths.whole, count_bundles(subject, run)) for run in runs]
    groups = []
    for key in counts[-1][1]:
        # What a run has none of takes nothing there.
        points = [(tokens, found.get(key, (0,) * (1 + len(_PARTS)))) for tokens, found in counts]
        size, *parts = (fit_bytes([(tokens, numbers[i]) for tokens, numbers in points]) for i in range(1 + len(_PARTS)))
        role, saved = key
        groups.append(
            TensorGroup(
                role=role, size=size, saved=saved, splits=False, estimated=role is not Role.INPUT,
                bundle=Bundle(**dict(zip(_PARTS, parts, strict=True))),
            )
        )  # fmt: skip
    return tuple(groups)


def bundles_at(groups: Sequence[TensorGroup], tokens: int) -> Counts | None:
    """The counts that ``groups`` stand for; None: they are no bundles."""
    found: Counts = {}
    for group in groups:
        if group.bundle is None:
            return None
        sizes: list[Growth] = [group.size, *(getattr(group.bundle, name) for name in _PARTS)]
        found[group.role, group.saved] = tuple(size.at(tokens) for size in sizes)
    return found


def count_bundles(subject: Subject, run: Trial) -> Counts:
    """Bytes of one run, by what execution does with a storage.

    What is made from parameters alone counts: when a block is not watched, nobody can tell it from the rest.
    """
    call, whole = run.call, run.whole
    hidden = call.leaves[subject.input_leaf]
    kept = parameter_storages(subject.block)
    kept |= {storage_key(tensor) for leaf, tensor in call.tensors() if leaf != subject.input_leaf}
    saved = [Member(tensor, None, index) for index, tensor in enumerate(whole.saved)]
    dropped = dropped_saves(subject.forward, call)
    needed = {index for index, tensor in enumerate(whole.saved) if index not in dropped and tensor.numel()}
    roles = {storage_key(hidden): Role.INPUT}
    asked = [Member(hidden, None)]
    for value, role in _pinned(run):
        roles.setdefault(storage_key(value), role)
        asked.append(Member(value, None))
    read = {storage_key(whole.saved[index]) for index in needed}
    parts: dict[tuple[Role, bool], tuple[list[torch.Tensor], list[Member]]] = {}
    for member in (*saved, *asked):
        storage = storage_key(member.tensor)
        if storage in kept:
            continue
        key = roles.get(storage, Role.WHOLE), storage in read
        live, sent = parts.setdefault(key, ([], []))
        if member.index is not None:
            live.append(member.tensor)
        if member.index is None or member.index in needed:
            sent.append(member)
    return {key: _numbers(live, sent, hidden) for key, (live, sent) in sorted(parts.items())}


def _pinned(run: Trial) -> list[tuple[torch.Tensor, Role]]:
    records = run.whole.by_key()
    return [
        (value, Role.MIXER if kind == PinKind.MIXER else Role.RANDOM)
        for key, kind in named_pins(run.whole).items()
        for value in records[key].pin_values().values()
        if isinstance(value, torch.Tensor) and value.numel()
    ]


def _numbers(live: list[torch.Tensor], sent: list[Member], hidden: torch.Tensor) -> tuple[int, ...]:
    found = parcels_of(sent, whole=storage_key(hidden))
    copied = [parcel.size_bytes for parcel in found.parcels]
    return (
        held_bytes((member.tensor for member in sent), hidden),
        held_bytes(live, hidden),
        sum(copied),
        sum(map(slot_bytes, copied)),
        found.gathered,
    )
