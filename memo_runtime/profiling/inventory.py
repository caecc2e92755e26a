"""From an observation to the groups and pins of a BlockProfile: every byte that backward needs, with its role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.grouping import Member, by_storage, locate
from memo_runtime.blocks.pins import PinKey
from memo_runtime.blocks.rerun import parameter_storages, storage_key
from memo_runtime.profiling.compare import Match
from memo_runtime.profiling.growth import polynomial_bytes
from memo_runtime.profiling.observe import Observation
from memo_runtime.profiling.slicing import Slicing, same_view
from memo_runtime.profiling.storages import with_storages
from memo_runtime.records import Growth, Pin, PinKind, Role, SavedTensor, TensorGroup, TokenAxis


@dataclass(slots=True)
class Inventory:
    """Groups, saved tensors and pins of one block."""

    groups: list[TensorGroup]
    saved: list[SavedTensor]
    pins: list[Pin]


def _axis(tensor: torch.Tensor, found: Match) -> TokenAxis | None:
    """Where ``tensor`` is cut; nowhere if one element stands for all tokens (``gate.expand_as(x)``)."""
    return found.axis if found.axis is not None and tensor.stride(found.axis.dim) else None


def _size(
    size_bytes: int, tokens: int, matches: Sequence[tuple[torch.Tensor, Match]], axis: TokenAxis | None
) -> Growth:
    """How the bytes of one piece grow, given what lies in it; expanding along tokens takes no bytes."""
    if axis is not None:
        return polynomial_bytes(size_bytes, tokens, 1)
    degree = max((sum(tensor.stride(dim) != 0 for dim in found.dims) for tensor, found in matches), default=0)
    padded = max((found.padded or 1 for _, found in matches), default=1) if degree else 1
    return polynomial_bytes(size_bytes, tokens, degree, padded)


class _Roles:
    """Why a storage is needed."""

    def __init__(
        self, block: nn.Module, call: BlockCall, whole: Observation, slicing: Slicing, input_leaf: int
    ) -> None:
        self.parameters = whole.derived_storages(parameter_storages(block))
        self.input = storage_key(call.leaves[input_leaf])
        self.shared = {storage_key(t) for leaf, t in call.tensors() if leaf != input_leaf} - {self.input}
        records = whole.by_key()
        self.pinned: dict[int, PinKind] = {}
        for key, kind in slicing.pins.items():
            for value in slicing.values_of(records[key]).values():
                if isinstance(value, torch.Tensor) and value.numel():
                    self.pinned[storage_key(value)] = kind

    def of(self, tensor: torch.Tensor, axis: TokenAxis | None, *, grows: bool) -> Role:
        """The role of a tensor's storage; ``grows``: something in it has a size that depends on the tokens."""
        key = storage_key(tensor)
        if key in self.parameters:
            return Role.PARAMETER
        if key == self.input:
            return Role.INPUT
        if key in self.shared:
            return Role.SHARED
        if key in self.pinned:
            return Role.MIXER if self.pinned[key] == PinKind.MIXER else Role.RANDOM
        if axis is not None:
            return Role.TOKEN
        return Role.WHOLE if grows else Role.FIXED


def take_inventory(
    block: nn.Module, call: BlockCall, whole: Observation, slicing: Slicing, *, input_leaf: int, token_dim: int
) -> Inventory:
    """Everything that a sliceable block keeps for backward, observed on ``call`` (detached, cropped)."""
    hidden = call.leaves[input_leaf]
    tokens = hidden.shape[token_dim]
    roles = _Roles(block, call, whole, slicing, input_leaf)
    inventory = Inventory([], [], [])
    members = [
        Member(tensor, _axis(tensor, slicing.saved[index]), index)
        for index, tensor in enumerate(whole.saved)
        if tensor.numel()
    ]
    empty = [index for index, tensor in enumerate(whole.saved) if not tensor.numel()]
    if empty:
        inventory.groups.append(TensorGroup(role=Role.FIXED, size=Growth(), splits=False))
        inventory.saved += [SavedTensor(index=index, group=0) for index in empty]
    found: dict[int, Match] = dict(enumerate(slicing.saved))
    input_axis = TokenAxis(dim=token_dim)
    if any(storage_key(member.tensor) == roles.input for member in members):
        members.append(Member(hidden, input_axis))
    else:
        _add_group(inventory, [Member(hidden, input_axis)], roles, found, tokens)
    for group in by_storage(members):
        _add_group(inventory, group, roles, found, tokens)
    inventory.saved.sort(key=lambda saved: saved.index)
    inventory.groups = with_storages(inventory.groups, inventory.saved, whole, tokens)
    _add_pins(inventory, whole, slicing, roles, tokens)
    return inventory


def _add_group(
    inventory: Inventory, members: Sequence[Member], roles: _Roles, found: Mapping[int, Match], tokens: int
) -> None:
    if roles.of(members[0].tensor, None, grows=False) in (Role.PARAMETER, Role.SHARED):
        pieces = [(0, list(members))]
    else:
        pieces = [(region.numel * flat.element_size(), inside) for region, flat, inside in locate(members, tokens)]
    for size, inside in pieces:
        axis = inside[0].axis
        matches = [(member.tensor, found[member.index]) for member in inside if member.index is not None]
        role = roles.of(inside[0].tensor, axis, grows=any(match.dims for _, match in matches))
        inventory.groups.append(
            TensorGroup(
                role=role,
                size=_size(size, tokens, matches, axis),
                saved=any(member.index is not None for member in inside),
                splits=axis is not None,
            )
        )
        number = len(inventory.groups) - 1
        inventory.saved += [
            SavedTensor(index=m.index, group=number, axis=m.axis) for m in inside if m.index is not None
        ]


def _add_pins(inventory: Inventory, whole: Observation, slicing: Slicing, roles: _Roles, tokens: int) -> None:
    records = whole.by_key()
    group_of = {saved.index: saved.group for saved in inventory.saved}
    for key, kind in slicing.pins.items():
        for output, value in slicing.values_of(records[key]).items():
            pin = _pin(key, output, kind, value, slicing)
            if isinstance(value, torch.Tensor) and value.numel():
                # What was written to since is no view of a saved tensor, but a copy: another value is saved there.
                saved = next((i for i, tensor in enumerate(whole.saved) if same_view(tensor, value)), None)
                if saved is None:
                    inventory.groups.append(_captured_group(value, pin, roles, tokens))
                    group = len(inventory.groups) - 1
                else:
                    group = group_of[saved]
                pin = replace(pin, group=group, saved=saved)
            inventory.pins.append(pin)


def _pin(key: PinKey, output: int, kind: PinKind, value: object, slicing: Slicing) -> Pin:
    return Pin(
        op=key[0],
        call=key[1],
        output=output,
        kind=kind,
        axis=slicing.axes.get((key, output)),
        dims=slicing.squares.get((key, output), ()),
        number=int(value) if isinstance(value, (int, float)) else None,
        empty=isinstance(value, torch.Tensor) and value.numel() == 0,
    )


def _captured_group(value: torch.Tensor, pin: Pin, roles: _Roles, tokens: int) -> TensorGroup:
    key = storage_key(value)
    if key in roles.parameters or key in roles.shared:
        role = Role.PARAMETER if key in roles.parameters else Role.SHARED
        return TensorGroup(role=role, size=Growth(), saved=False, splits=False)
    (region, flat, _), *_ = locate([Member(value, pin.axis)], tokens)
    dims = 1 if pin.axis is not None else len(pin.dims)
    return TensorGroup(
        role=Role.MIXER if pin.kind == PinKind.MIXER else Role.RANDOM,
        size=polynomial_bytes(region.numel * flat.element_size(), tokens, dims),
        saved=False,
        splits=pin.axis is not None,
    )
