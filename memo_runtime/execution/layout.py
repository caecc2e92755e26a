"""Sorting what a block saved into pieces: by the plan, or by storage where a plan cannot know.

The planned layout follows the block's profile: the k-th saved tensor belongs to the group that it belonged to when
the block was profiled. A block whose saves depend on data is sorted by storage at every call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.grouping import Member, locate
from memo_runtime.blocks.parcels import held_bytes, parcels_of
from memo_runtime.blocks.pins import PinKey, Values
from memo_runtime.blocks.region import Region
from memo_runtime.blocks.rerun import storage_key
from memo_runtime.execution.piece import Piece
from memo_runtime.execution.replay import Source
from memo_runtime.execution.stash import Stash
from memo_runtime.records import (
    Action,
    BlockPlan,
    BlockProfile,
    Pin,
    Role,
    SavedTensor,
    TensorGroup,
    TokenAxis,
)
from memo_runtime.sizes import stored_bytes

Captured = Mapping[PinKey, Values]
#: By group: its region, the region's elements, and its members in the order of the region's views.
Found = dict[int, tuple[Region, torch.Tensor, list[Member]]]


@dataclass(slots=True)
class Sorted:
    """Pieces of one call and where its rerun finds the input and the pinned values; ``complete``: it needs none."""

    complete: bool = False
    input_source: Source = field(default_factory=Source)
    pins: dict[PinKey, dict[int, Source]] = field(default_factory=dict)
    outgoing: list[tuple[Piece, torch.Tensor]] = field(default_factory=list)


def _has_tokens(tensor: torch.Tensor, axis: TokenAxis | None, tokens: int) -> bool:
    """``tensor`` grows along ``axis`` as its profile says."""
    if axis is None:
        return True
    return axis.dim < tensor.dim() and tensor.shape[axis.dim] == axis.outer * tokens * axis.inner


class PlannedLayout:
    """Sorts by the k-index of the profile."""

    def __init__(self, profile: BlockProfile, plan: BlockPlan) -> None:
        self.profile = profile
        self.plan = plan
        self._saved: dict[int, list[SavedTensor]] = {}
        for saved in profile.saved:
            self._saved.setdefault(saved.group, []).append(saved)
        self._captured = {pin.group: pin for pin in profile.pins if pin.group is not None and pin.saved is None}
        self._input_group = next(
            (i for i, group in enumerate(profile.groups) if group.role == Role.INPUT and group.splits), None
        )
        #: Outputs of operator calls that are remembered while the forward runs.
        self.captures: dict[PinKey, tuple[int, ...]] = {}
        for pin in profile.pins:
            if pin.group is not None and pin.saved is None:
                self.captures[pin.op, pin.call] = (*self.captures.get((pin.op, pin.call), ()), pin.output)
        self._expected = self.captures.keys() if plan.prefix < plan.tokens else set()

    def find(self, stash: Stash, call: BlockCall, captured: Captured) -> Found | None:
        """Where the bytes of every stored group lie; None where the call saved something else than its profile."""
        tokens = self.plan.tokens
        if len(stash.pending) != len(self.profile.saved) or not captured.keys() >= self._expected:
            return None
        if not all(_has_tokens(stash.pending[entry.index], entry.axis, tokens) for entry in self.profile.saved):
            return None
        found: Found = {}
        for number, action in enumerate(self.plan.actions):
            if action in (Action.KEEP, Action.REBUILD):
                continue
            members = self._members(number, stash, call, captured)
            if len({(storage_key(member.tensor), member.tensor.dtype) for member in members}) > 1:
                return None  # where it was profiled they shared their bytes
            pieces = locate(members, tokens)
            if len(pieces) != 1:
                return None
            found[number] = pieces[0]
        return found

    def skeletal_bytes(self) -> int:
        """Bytes that the call holds for backward while it runs."""
        tokens = self.plan.tokens
        kept = (Role.PARAMETER, Role.SHARED)
        own = (group for group in self.profile.groups if group.saved and group.role not in kept)
        return stored_bytes(own, tokens)

    def sort(self, stash: Stash, call: BlockCall, captured: Captured, found: Found) -> Sorted:
        """Make the pieces of ``stash`` and take their host memory; the copies are listed in ``outgoing``."""
        result = Sorted(complete=self.plan.prefix >= self.plan.tokens)
        sources: dict[int, Source] = {}
        stay: list[TensorGroup] = []
        rebuilt: dict[int, Piece] = {}
        for number, group in enumerate(self.profile.groups):
            action = self.plan.actions[number]
            saved = self._saved.get(number, [])
            if action == Action.KEEP:
                counted = group.role not in (Role.PARAMETER, Role.SHARED)
                for entry in saved:
                    stash.keep(entry.index)
                if counted and group.saved:
                    stay.append(group)
                continue
            if action == Action.REBUILD:
                piece = self._rebuilt_piece(stash, group, rebuilt)
            else:
                piece = Piece(action, stash.tools.ledger, group.size.at(self.plan.tokens))
                stash.pieces.append(piece)
                region, flat, members = found[number]
                piece.exact = self.plan.prefix >= self.plan.tokens
                piece.store(region, flat, self.plan.prefix, self.plan.device_rows, stash.tools.pool)
                stash.counters.bytes_kept += piece.bytes_kept
                result.outgoing.append((piece, flat))
                sources[number] = Source(piece, len(members) - 1)
            for position, entry in enumerate(saved):
                stash.assign(entry.index, piece, position)
        stash.hold_kept(stored_bytes(stay, self.plan.tokens))
        self._find_input(result, stash, call, sources)
        self._find_pins(result, stash, captured, sources)
        return result

    def _rebuilt_piece(self, stash: Stash, group: TensorGroup, known: dict[int, Piece]) -> Piece:
        """What a rerun makes of ``group``: one piece for all in one storage, which is there as long as one is."""
        if group.storage is not None and group.storage.number in known:
            return known[group.storage.number]
        piece = Piece(Action.REBUILD, stash.tools.ledger, stored_bytes([group], self.plan.tokens))
        stash.pieces.append(piece)
        if group.storage is not None:
            known[group.storage.number] = piece
        return piece

    def _members(self, number: int, stash: Stash, call: BlockCall, captured: Captured) -> list[Member]:
        members = [Member(stash.pending[s.index], s.axis, s.index) for s in self._saved.get(number, [])]
        if number == self._input_group:
            hidden = call.leaves[self.profile.input_leaf]
            members.append(Member(hidden.detach(), TokenAxis(dim=self.profile.token_dim)))
        pin = self._captured.get(number)
        if pin is not None:
            value = captured[pin.op, pin.call][pin.output]
            assert isinstance(value, torch.Tensor), "only tensors have a group"
            members.append(Member(value, pin.axis))
        return members

    def _find_input(self, result: Sorted, stash: Stash, call: BlockCall, sources: dict[int, Source]) -> None:
        axis = TokenAxis(dim=self.profile.token_dim)
        source = sources.get(self._input_group) if self._input_group is not None else None
        if source is not None:
            result.input_source = Source(source.piece, source.position, axis=axis)
        elif self.plan.prefix < self.plan.tokens:
            # Too small to be worth a copy.
            result.input_source = Source(kept=call.leaves[self.profile.input_leaf].detach(), axis=axis)

    def _find_pins(self, result: Sorted, stash: Stash, captured: Captured, sources: dict[int, Source]) -> None:
        if self.plan.prefix >= self.plan.tokens:
            return
        for pin in self.profile.pins:
            outputs = result.pins.setdefault((pin.op, pin.call), {})
            outputs[pin.output] = self._pin_source(pin, stash, captured, sources)

    @staticmethod
    def _pin_source(pin: Pin, stash: Stash, captured: Captured, sources: dict[int, Source]) -> Source:
        if pin.group is None:
            return Source(kept=torch.empty(0) if pin.empty else pin.number)
        if pin.saved is not None:
            holder = stash.holder(pin.saved)
            if holder is not None and holder.piece is not None:
                return Source(holder.piece, holder.position, axis=pin.axis, dims=pin.dims)
            return Source(kept=stash.pending[pin.saved], axis=pin.axis, dims=pin.dims)
        source = sources.get(pin.group)
        if source is not None:
            return Source(source.piece, source.position, axis=pin.axis, dims=pin.dims)
        return Source(kept=captured[pin.op, pin.call][pin.output], axis=pin.axis, dims=pin.dims)


class StorageLayout:
    """Sorts by storage: parameters and arguments stay; the rest goes to the host or is dropped.

    Args:
        rebuild: what is neither the input nor a pinned value is dropped and rebuilt; False: it goes to the host.
        pinned: results replaced in the rerun are stashed too.
        input_leaf: which argument is the input; None: the call has none, and its arguments stay.
    """

    def __init__(self, *, rebuild: bool, pinned: bool, input_leaf: int | None) -> None:
        self.rebuild = rebuild
        self.pinned = pinned
        self.input_leaf = input_leaf

    def sort(self, stash: Stash, call: BlockCall, captured: Captured, kept: set[int]) -> Sorted:
        """Like ``PlannedLayout.sort``; ``kept`` are the storages of the block's parameters."""
        result = Sorted(complete=not self.rebuild)
        kept = kept | {storage_key(t) for leaf, t in call.tensors() if leaf != self.input_leaf}
        hidden = call.leaves[self.input_leaf] if self.input_leaf is not None else None
        stash.hold_skeletal(held_bytes((t for t in stash.pending if storage_key(t) not in kept), hidden))
        needed = self._needed(call, captured) if self.rebuild else {}
        wanted = {storage_key(tensor) for tensor in needed.values()} - kept
        stored: list[Member] = []
        dropped: list[int] = []
        for index, tensor in enumerate(stash.pending):
            if stash.holder(index) is None:
                continue  # its node is gone: the forward went backward itself, or dropped that branch
            key = storage_key(tensor)
            if key in kept or not tensor.numel():
                stash.keep(index)
            elif not self.rebuild or key in wanted:
                stored.append(Member(tensor, None, index))
            else:
                dropped.append(index)
        self._drop(stash, dropped)
        stored += [Member(tensor, None) for tensor in needed.values() if storage_key(tensor) in wanted]
        found = self._store(result, stash, stored, storage_key(hidden) if hidden is not None else None)
        sources = {name: found.get(id(t)) or Source(kept=t) for name, t in needed.items()}
        result.input_source = sources.get(_INPUT, Source())
        for pin, values in captured.items() if self.rebuild and self.pinned else ():
            result.pins[pin] = {
                output: sources.get((pin, output)) or Source(kept=value) for output, value in values.items()
            }
        return result

    @staticmethod
    def _drop(stash: Stash, dropped: list[int]) -> None:
        if not dropped:
            return
        piece = Piece(Action.REBUILD, stash.tools.ledger, held_bytes(stash.pending[index] for index in dropped))
        stash.pieces.append(piece)
        for index in dropped:
            stash.assign(index, piece, 0)

    def _needed(self, call: BlockCall, captured: Captured) -> dict[object, torch.Tensor]:
        """Tensors that the rerun needs, by what they are."""
        needed: dict[object, torch.Tensor] = {}
        if self.input_leaf is not None:
            needed[_INPUT] = call.leaves[self.input_leaf].detach()
        for pin, values in captured.items() if self.pinned else ():
            for output, value in values.items():
                if isinstance(value, torch.Tensor) and value.numel():
                    needed[pin, output] = value
        return needed

    def _store(
        self, result: Sorted, stash: Stash, members: list[Member], whole: int | None
    ) -> dict[int, Source]:
        """Make the pieces; returns where members that are no saved tensors are, by identity."""
        found: dict[int, Source] = {}
        sorted_ = parcels_of(members, whole=whole)
        stash.hold_gathered(sorted_.gathered)
        for parcel in sorted_.parcels:
            piece = Piece(Action.HOST, stash.tools.ledger, parcel.size_bytes)
            stash.pieces.append(piece)
            piece.exact = not self.rebuild
            piece.store(parcel.region, parcel.flat, 0, 0, stash.tools.pool)
            result.outgoing.append((piece, parcel.flat))
            for position, member in enumerate(parcel.members):
                if member.index is not None:
                    stash.assign(member.index, piece, position)
                else:
                    found[id(member.tensor)] = Source(piece, position)
        return found


_INPUT = "input"
