"""Blocks that are like one that was calibrated: two short runs show it, where calibrating takes eight.

Most blocks of a stack differ in their weights alone. Such a block runs the same operators on the same shapes, with the
same numbers beside them. So it costs the same FLOPs, and what most of its operators are by themselves
(profiling/alone.py) is known. What depends on values is looked at again: a slice is run with the pins of the known
block, every operator's result and every saved tensor is compared with the whole's, and what it saves has to be stored
as the known block's is. Where anything differs the block is calibrated by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.failures import pass_on
from memo_runtime.profiling.inventory import take_inventory
from memo_runtime.profiling.observe import Observation
from memo_runtime.profiling.slicing import Slicing, slice_alike
from memo_runtime.profiling.storages import at_length
from memo_runtime.profiling.trial import Subject, Trial, run_whole
from memo_runtime.profiling.unsliced import unsliced
from memo_runtime.records import ArgumentAxes, BlockProfile

Structure = tuple[object, ...]
#: A run without values: every operator with its arguments and results, and every saved tensor.
Sketch = tuple[tuple[tuple[object, ...], ...], tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class Example:
    """A calibrated block, as later ones are compared with it.

    Attributes:
        make: classes and parameters, and structure: arguments too; they have to agree before anything is run.
        sketch: of its run on a crop, which was called with ``call``.
        reason: why no slice of it is tried; "": slices are made as ``slicing`` says.
    """

    make: Structure
    structure: Structure
    call: BlockCall
    profile: BlockProfile
    sketch: Sketch
    slicing: Slicing
    reason: str

    @classmethod
    def of(cls, subject: Subject, profile: BlockProfile, trial: Trial, reason: str) -> Example:
        """The block of ``profile``, made from ``trial``, of which no tensor but the arguments is kept."""
        slicing = replace(trial.slicing, saved=[])
        make = make_of(subject.block, subject.stack)
        return cls(make, structure_of(subject), trial.call, profile, _sketch(trial.whole), slicing, reason)


def make_of(block: nn.Module, stack: int) -> Structure:
    """Classes and parameters of a block, without names or values."""
    return (
        stack,
        tuple((name, type(module), module.training) for name, module in block.named_modules()),
        tuple((name, _look(parameter)) for name, parameter in block.named_parameters()),
    )


def structure_of(subject: Subject) -> Structure:
    """What a block is made of and what it is called with, without names or values."""
    call = subject.call
    return (
        *make_of(subject.block, subject.stack),
        subject.input_leaf,
        call.signature(),
        tuple((leaf, tuple(tensor.shape)) for leaf, tensor in call.tensors()),
    )


def like_one_of(examples: Iterable[Example], subject: Subject) -> BlockProfile | None:
    """The profile of ``subject`` if it is like one of ``examples``, which have its structure; None: like none."""
    wholes: dict[tuple[int, tuple[ArgumentAxes, ...]], Trial] = {}
    for example in examples:
        axes = example.profile.token_dim, example.profile.arguments
        try:
            if axes not in wholes:
                wholes[axes] = run_whole(subject, *axes)
            profile = _like(example, subject, wholes[axes])
        except Exception as error:
            pass_on(error)
            continue
        if profile is not None:
            return profile
    return None


def _like(example: Example, subject: Subject, trial: Trial) -> BlockProfile | None:
    known, whole = example.profile, trial.whole
    if whole.walked or bool(whole.saved) != bool(known.groups):
        return None
    if known.dynamic:
        return _like_as_a_whole(example, subject, trial)
    if _sketch(whole) != example.sketch:
        return None
    same = replace(known, name=subject.name, tokens=subject.hidden.shape[trial.token_dim])
    if not whole.saved:
        return same
    slicing = slice_alike(
        subject.forward, trial.call, whole,
        known=example.slicing, arguments=trial.arguments, lengths=trial.lengths,
    )  # fmt: skip
    if slicing is None:
        return None
    found = take_inventory(
        subject.block, trial.call, whole, slicing, input_leaf=subject.input_leaf, token_dim=trial.token_dim
    )
    groups = tuple(at_length(known.groups, trial.lengths.whole))
    stored = (tuple(found.saved), tuple(found.groups), tuple(found.pins))
    return same if stored == (known.saved, groups, known.pins) else None


def _like_as_a_whole(example: Example, subject: Subject, trial: Trial) -> BlockProfile | None:
    """Where sizes depend on data, as with routed experts: no slice is tried, which is always exact."""
    known, whole = example.profile, trial.whole
    operators, _ = example.sketch
    if {record.key[0] for record in whole.operators} != {operator[0] for operator in operators}:
        return None
    trial.slicing = Slicing(reason=example.reason)
    return unsliced(subject, trial, example.reason, like=known)


def _sketch(observation: Observation) -> Sketch:
    operators = tuple(
        (*record.key, *map(_look, _pytree.tree_leaves((record.args, record.kwargs))), *map(_look, record.outputs))
        for record in observation.operators
    )
    return operators, tuple(_look(tensor) for tensor in observation.saved)


def _look(value: Any) -> object:
    """``value`` without what it holds, if it is a tensor; plain numbers and settings as they are."""
    if isinstance(value, torch.Tensor):
        strides = value.stride() if value.layout == torch.strided else None
        return tuple(value.shape), strides, value.layout, value.dtype, value.device, value.requires_grad
    plain = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
    # A number may be one that is not equal to itself.
    return repr(value) if isinstance(value, plain) else type(value)
