"""Watching one run of a block: every operator with its results, and every tensor saved for backward.

Observations hold all results alive, so they are made on a short crop of the sequence.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree

from memo_runtime.blocks.ambient import AutocastState
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.containers import leaves_of
from memo_runtime.blocks.operators import is_mutable, pin_kind, written_by
from memo_runtime.blocks.pins import PinKey, ReplayMode, Value, Values, outputs_of, pin_values, written_storages
from memo_runtime.blocks.region import copied_as_it_is
from memo_runtime.blocks.rerun import Forward, is_sparse, parameter_storages, run_again, storage_key
from memo_runtime.profiling.bounds import check_bounds

_MAKES_SPARSE = (
    "it saves a sparse tensor that it makes itself, and these are not copied to the host. Would work: one that is made "
    "in front of the blocks and given to them, or held as a buffer"
)


@dataclass(slots=True)
class OperatorRecord:
    """One operator call: what it read and what it gave."""

    key: PinKey
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[Any, ...]
    mutable: bool
    replaced: bool
    lists: bool  # yields lists of tensors, whose members cannot be pinned one by one
    func: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    #: Storages as they were then: a module may give a tensor's storage away later.
    input_storages: tuple[int, ...] = ()
    #: What a pin of this call holds, taken at once: the forward may scale the result in place.
    pinned: dict[int, Value] | None = None
    #: Outputs as they were when it returned, of those that were written to since.
    then: dict[int, torch.Tensor] = field(default_factory=dict)
    #: Versions of its outputs when it returned.
    versions: tuple[int, ...] = ()

    def pin_values(self) -> dict[int, Value]:
        """What a pin of this call holds."""
        return self.pinned if self.pinned is not None else pin_values(self.key[0], self.as_returned())

    def as_returned(self) -> tuple[Any, ...]:
        """Its outputs with the values that it gave them; ``outputs`` may have been written to since."""
        return tuple(self.then.get(index, value) for index, value in enumerate(self.outputs))

    @property
    def is_view(self) -> bool:
        """It gives memory that it was given."""
        own = (storage_key(value) for value in self.outputs if isinstance(value, torch.Tensor))
        return not self.mutable and any(storage in self.input_storages for storage in own)

    def preserve(self, index: int) -> None:
        """Output ``index`` is about to be written to."""
        value = self.outputs[index]
        self.then[index] = copied_as_it_is(value.detach())
        held = self.pinned.get(index) if self.pinned is not None else None
        if self.pinned is not None and isinstance(held, torch.Tensor) and storage_key(held) == storage_key(value):
            self.pinned[index] = self.then[index]

    def is_written_unseen(self) -> bool:
        """A result of its own was written to by no operator that PyTorch shows (a kernel that says so)."""
        if self.mutable or self.replaced or self.is_view:
            return False
        pairs = enumerate(zip(self.outputs, self.versions, strict=False))
        return any(
            index not in self.then and isinstance(value, torch.Tensor) and value._version != version
            for index, (value, version) in pairs
        )


@dataclass(slots=True)
class Observation:
    """One run of a block."""

    saved: list[torch.Tensor] = field(default_factory=list)
    operators: list[OperatorRecord] = field(default_factory=list)
    flops: int = 0
    flops_to_last_save: int = 0  # where a rerun may end
    walked: bool = False  # the forward went backward itself
    never_again: str = ""  # what it does that no rerun would repeat
    returned: str = ""  # what it returned, if that shows no tensor or is run later (a generator)

    def walk(self) -> None:
        """Note that the forward went backward itself."""
        self.walked = True

    def unseen(self, call: BlockCall, block: nn.Module) -> str:
        """Why the work of ``block`` is not what was observed of it; "": it is."""
        if any(isinstance(tensor, FakeTensor) for tensor in self.saved):
            return self._traced_inside()
        known = {storage_key(tensor) for _, tensor in call.tensors()} | parameter_storages(block)
        if any(is_sparse(tensor) and storage_key(tensor) not in known for tensor in self.saved):
            return _MAKES_SPARSE
        trained = any(parameter.requires_grad for parameter in block.parameters())
        if not self.returned or self.saved or not (trained or any(t.requires_grad for _, t in call.tensors())):
            return ""
        return f"its forward saves nothing for backward and returns a {self.returned}: its work comes after it, unseen"

    def _traced_inside(self) -> str:
        called = (record.func.name() for record in self.operators if isinstance(record.func, HigherOrderOperator))
        names = " and ".join(dict.fromkeys(called)) or "that it calls"
        return (
            f"the higher-order operator {names} has its branches or its loop traced on tensors without elements: what "
            "it saves for backward cannot be told from what is saved then. Nothing of this block is swapped or run "
            "again, and it trains as it does unwrapped. Would work: torch.where, or Python's own if or loop"
        )

    def counts(self) -> Counter[str]:
        """How often each operator was called."""
        return Counter(record.key[0] for record in self.operators)

    def by_key(self) -> dict[PinKey, OperatorRecord]:
        """The operator calls by (operator, call)."""
        return {record.key: record for record in self.operators}

    def derived_storages(self, parameters: set[int]) -> set[int]:
        """Storages of ``parameters`` and of what was made from them alone, such as autocast's copies."""
        derived = set(parameters)
        for record in self.operators:
            if record.inputs and not record.mutable and all(key in derived for key in record.input_storages):
                derived.update(storage_key(t) for t in record.outputs if isinstance(t, torch.Tensor))
        return derived


def _tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors among what an operator is given."""
    if isinstance(func, HigherOrderOperator):
        yield from (leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        return
    # All others take numbers, tensors, and lists of these, which PyTorch's trees open at many times the cost.
    for given in (*args, *kwargs.values()):
        for leaf in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(leaf, torch.Tensor):
                yield leaf


class ObservingMode(ReplayMode):
    """Replaces pinned calls like a rerun, and records every call with what it gave."""

    def __init__(self, values: Mapping[PinKey, Values], unwritten: frozenset[PinKey]) -> None:
        # By copies: whatever this run writes to, the values of the first one stay.
        super().__init__(values, written=values.keys() - unwritten)
        self.operators: list[OperatorRecord] = []
        #: Words for an operator whose gradient PyTorch loses under this mode; "": none.
        self.loses = ""
        #: Results that have the values that they were given, by storage.
        self._unwritten: dict[int, list[tuple[OperatorRecord, int]]] = {}

    def handle(self, func: Any, key: PinKey, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run or replace the operator and record it."""
        inputs = tuple(_tensors(func, args, kwargs))
        storages = tuple(storage_key(tensor) for tensor in inputs)
        if not self.replaces(key):
            check_bounds(func, args, kwargs)
        mutable = is_mutable(func)
        if mutable and not self.loses:
            self.loses = _loses(func, key[0], args, kwargs)
        for storage in written_storages(func, args, kwargs) if mutable else ():
            for record, index in self._unwritten.pop(storage, ()):
                record.preserve(index)
        out = super().handle(func, key, args, kwargs)
        values = outputs_of(func, args, kwargs, out)
        record = OperatorRecord(
            key=key,
            inputs=inputs,
            outputs=values,
            mutable=mutable,
            replaced=key in self.replaced,
            lists=isinstance(out, list),
            func=func,
            args=args,
            kwargs=kwargs,
            input_storages=storages,
            pinned=pin_values(key[0], values) if pin_kind(key[0]) is not None else None,
            versions=tuple(value._version if isinstance(value, torch.Tensor) else 0 for value in values),
        )
        self.operators.append(record)
        for index, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                self._unwritten.setdefault(storage_key(value), []).append((record, index))
        return out


def observe(
    forward: Forward,
    call: BlockCall,
    values: Mapping[PinKey, Values] | None = None,
    *,
    last: int | None = None,
    unwritten: frozenset[PinKey] = frozenset(),
) -> Observation:
    """Run ``forward`` on ``call`` (detached), replacing the calls in ``values``, and record everything.

    It fails where it writes to one of those values that are to stay ``unwritten``.

    Under autocast the cast of a parameter is seen in every run: what is made from parameters is told by it.
    """
    mode = ObservingMode(values or {}, unwritten)
    observation = Observation()
    saves: list[tuple[torch.Tensor, int, int]] = []
    device = next((tensor.device.type for _, tensor in call.tensors()), "cpu")

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        leaves = leaves_of(output)
        if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            observation.returned = type(leaves[0] if leaves else output).__name__
        return output

    def see(_: int, tensor: torch.Tensor) -> None:
        observation.saved.append(tensor)
        saves.append((tensor, tensor._version, len(mode.operators)))
        observation.flops_to_last_save = mode.flops

    with AutocastState.current(device).uncached().restored():
        run_again(
            watched, call, see, mode=mode, last=last, on_walk=observation.walk,
        )  # fmt: skip
    observation.operators = mode.operators
    observation.never_again = _saved_early(saves, mode.operators) or mode.loses
    observation.flops = mode.flops
    return observation


def dropped_saves(forward: Forward, call: BlockCall) -> frozenset[int]:
    """Saved tensors whose nodes are gone when ``forward`` is done: nothing that it yields comes from them.

    In a run of its own: what ``observe`` records holds every node.
    """
    held: list[weakref.ref[Any]] = []
    found: set[int] = set()
    device = next((tensor.device.type for _, tensor in call.tensors()), "cpu")

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        found.update(index for index, kept in enumerate(held) if kept() is None)
        return output

    with AutocastState.current(device).uncached().restored():
        run_again(
            watched, call, _forget, mode=contextlib.nullcontext(), last=None, on_walk=_go_on, held=held,
        )  # fmt: skip
    return frozenset(found)


def _forget(index: int, tensor: torch.Tensor) -> None:
    """Nobody needs it."""


def _go_on() -> None:
    """It went backward itself."""


def _saved_early(saves: Sequence[tuple[torch.Tensor, int, int]], operators: Sequence[OperatorRecord]) -> str:
    """Words for the first operator that wrote to a tensor behind autograd's back after it was saved; "": none did.

    ``saves``: every saved tensor with its version then, and how many operators had run. A write that autograd counts
    is the block's own doing, and an error of its backward.
    """
    writers = [(number, record) for number, record in enumerate(operators) if record.mutable]
    for tensor, version, count in saves if writers else ():
        for number, record in writers:
            written = {storage_key(value) for value in record.outputs if isinstance(value, torch.Tensor)}
            if number >= count and tensor._version == version and storage_key(tensor) in written:
                late = "writes to a tensor after autograd has saved it, where a rerun would take it as it is before"
                return f"{record.key[0]} {late}"
    return ""


def _loses(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Words for an operator that writes to views in a list; "": it does not."""
    lists = (written for written in written_by(func, args, kwargs) if isinstance(written, (list, tuple)))
    if not any(isinstance(one, torch.Tensor) and one._is_view() for written in lists for one in written):
        return ""
    return f"{name} writes to views, and PyTorch loses its gradient under a dispatch mode, such as a rerun's"
