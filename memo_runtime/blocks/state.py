"""The state that a forward of a block starts from, and running the block from it again.

Between a forward and its backward anything may change: a block counts its calls, ``functional_call`` exchanges weights,
a training loop clears an attribute, freezes a part, or calls ``eval()``. The model as it is runs nothing again in
backward, so none of it matters. A rerun has to see what its forward saw, and must leave no trace:

    forward    what every reachable place holds is noted by reference, and the version of every tensor
    rerun      where something else is there now, the forward's is put in its place, and what is there now is put back

What was written in place cannot be put back, nor can elements that were exchanged under a tensor: that is an error.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.cache import is_cache
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.parametrized import ComputedWeights
from memo_runtime.blocks.reach import Reach, reach
from memo_runtime.blocks.rerun import storage_key
from memo_runtime.blocks.undo import Undo
from memo_runtime.errors import StateChangedError

_ADVICE = "policy='swap' runs nothing again"


# ---- generators that PyTorch does not own


def shared_generators() -> list[Any]:
    """Python's module ``random``, and NumPy's where it is loaded: reading their states takes tens of microseconds."""
    library = sys.modules.get("numpy.random")
    return [random] if library is None else [random, library]


def _generator_state(generator: Any) -> Any:
    if hasattr(generator, "getstate"):  # Python's
        return generator.getstate()
    if hasattr(generator, "get_state"):  # PyTorch's, and NumPy's old ones
        return generator.get_state()
    return generator.bit_generator.state


def _set_generator(generator: Any, state: Any) -> None:
    if hasattr(generator, "setstate"):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def _equal(a: Any, b: Any) -> bool:
    """Equality of states, which hold arrays."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        try:
            return bool(a == b)  # Python's is 625 numbers
        except (ValueError, RuntimeError):  # arrays are inside, which compare by element
            return len(a) == len(b) and all(map(_equal, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


@dataclass(frozen=True, slots=True)
class LibraryRandom:
    """States of ``generators``; ``shared_generators`` are those of Python and of NumPy themselves."""

    states: tuple[tuple[Any, Any], ...]

    @classmethod
    def current(cls, generators: Iterable[Any]) -> LibraryRandom:
        """The states at this point."""
        return cls(tuple((generator, _generator_state(generator)) for generator in generators))

    def set(self) -> None:
        """Make them the current states."""
        for generator, state in self.states:
            _set_generator(generator, state)

    def advanced(self) -> bool:
        """A generator is in another state now."""
        return any(not _equal(_generator_state(generator), state) for generator, state in self.states)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Run from these states, then put back those from before."""
        undo = Undo(LibraryRandom.current(generator for generator, _ in self.states).set)
        try:
            self.set()
            yield
        finally:
            undo()


# ---- cells


@contextlib.contextmanager
def _cells_as(reaches: Iterable[Reach]) -> Iterator[None]:
    """Run with the contents of ``reaches``, then put back those from before."""
    reaches = tuple(reaches)
    now = [{index: found.cells[index].read() for index in found.changed()} for found in reaches]

    def put_back() -> None:
        for found, changed in zip(reaches, now, strict=True):
            for index, cell in enumerate(found.cells):
                want = changed[index] if index in changed else found.contents[index]
                if not cell.same(want):
                    cell.write(want)

    undo = Undo(put_back)
    try:
        for found, changed in zip(reaches, now, strict=True):
            for index in changed:
                found.cells[index].write(found.contents[index])
        yield
    finally:
        undo()


# ---- tensors


#: Tensors that a block writes to are cloned before its forward up to this size; larger ones forbid a rerun.
MOST_CLONED_BYTES = 64 * 1024**2


def _is_plain(tensor: torch.Tensor) -> bool:
    """Neither made of other tensors (sharded, quantised) nor made in inference mode, where it has no version."""
    return not hasattr(tensor, "__tensor_flatten__") and not tensor.is_inference()


@dataclass(slots=True)
class _Mark:
    """One tensor as a forward found it."""

    label: str
    tensor: torch.Tensor
    version: int
    storage: int
    shape: torch.Size
    requires_grad: bool
    #: An engine exchanges the elements at will (ZeRO).
    exchanged: bool

    @classmethod
    def of(cls, label: str, tensor: torch.Tensor) -> _Mark:
        exchanged = hasattr(tensor, "ds_id") or (isinstance(tensor, nn.Parameter) and not tensor.numel())
        return cls(label, tensor, tensor._version, storage_key(tensor), tensor.shape, tensor.requires_grad, exchanged)

    def again(self) -> _Mark:
        """The same tensor as it is now."""
        label, tensor = self.label, self.tensor
        return _Mark(
            label, tensor, tensor._version, storage_key(tensor), tensor.shape, tensor.requires_grad, self.exchanged
        )

    def moved(self) -> bool:
        """Somebody has put other elements under the tensor, or given it another size."""
        if self.exchanged:
            return False
        if self.tensor.shape != self.shape:  # engines gather parameters
            return not isinstance(self.tensor, nn.Parameter)
        return storage_key(self.tensor) != self.storage

    def check(self, block: str) -> None:
        """Raise where the tensor is not what it was."""
        tensor = self.tensor
        if tensor._version != self.version:
            raise StateChangedError(
                f"'{block}' has to be run again for its backward, and {self.label} {tuple(self.shape)} has been "
                f"modified by an inplace operation since its forward: it is at version {tensor._version}; expected "
                f"version {self.version} instead. Step the optimizer after backward; {_ADVICE}"
            )
        if self.moved():
            raise StateChangedError(
                f"'{block}' has to be run again for its backward, and the elements of {self.label} "
                f"{tuple(self.shape)} have been exchanged since its forward (an assignment to .data). Assign another "
                f"parameter instead, or do so after backward; {_ADVICE}"
            )


def _marks(found: Reach) -> list[_Mark]:
    return [_Mark.of(label, tensor) for label, tensor in found.tensors if _is_plain(tensor)]


@contextlib.contextmanager
def _requires_grad_as(marks: Iterable[_Mark]) -> Iterator[None]:
    """Parameters that were frozen or thawed since save other tensors: run with what the forward had."""
    changed = [mark for mark in marks if mark.tensor.is_leaf and mark.tensor.requires_grad != mark.requires_grad]

    def put_back() -> None:
        for mark in changed:
            mark.tensor.requires_grad_(not mark.requires_grad)

    undo = Undo(put_back)
    try:
        for mark in changed:
            mark.tensor.requires_grad_(mark.requires_grad)
        yield
    finally:
        undo()


# ---- one call


def _of_modules(found: Reach) -> list[torch.Tensor]:
    """Buffers and plain tensors among what was found."""
    return [tensor for _, tensor in found.tensors if not isinstance(tensor, nn.Parameter)]


class CallState:
    """The state that one call of a block started from."""

    def __init__(self, module: Reach, marks: list[_Mark], arguments: Reach | None, *, draws: bool) -> None:
        self._reaches = (module,) if arguments is None else (module, arguments)
        self._marks = marks if arguments is None else [*marks, *_marks(arguments)]
        generators = [generator for found in self._reaches for generator in found.generators]
        self._random = LibraryRandom.current([*generators, *shared_generators()] if draws else generators)
        self._weights = ComputedWeights.current()

    def writable(self) -> list[torch.Tensor]:
        """Tensors of the block's modules, parameters aside, that are small enough to be cloned at every call."""
        small = (t for t in _of_modules(self._reaches[0]) if t.numel() * t.element_size() <= MOST_CLONED_BYTES)
        return [tensor for tensor in small if _is_plain(tensor) and tensor.layout is torch.strided]

    def written(self, restored: Iterable[torch.Tensor]) -> str:
        """To be called when the forward is done: the first tensor that it wrote to in place, by name; "" if none.

        ``restored`` are tensors whose values a rerun restores by itself, in the memory that they have.
        """
        known = {id(tensor) for tensor in restored}
        moved = next((mark.label for mark in self._marks if mark.moved()), "")
        self._marks = [mark for mark in self._marks if id(mark.tensor) not in known]
        return moved or next((mark.label for mark in self._marks if mark.tensor._version != mark.version), "")

    def watch(self, label: str, tensor: torch.Tensor) -> None:
        """Refuse a rerun too if ``tensor``, which it reads, is written to from now on."""
        if _is_plain(tensor):
            self._marks = [*self._marks, _Mark.of(label, tensor)]

    @contextlib.contextmanager
    def restored(self, block: str) -> Iterator[None]:
        """Run from this state, then put back the present one.

        Raises:
            StateChangedError: since the forward of ``block`` a tensor was written to, or its elements exchanged.
        """
        for mark in self._marks:
            mark.check(block)
        cells, grads = _cells_as(self._reaches), _requires_grad_as(self._marks)
        with cells, grads, self._random.restored(), self._weights.restored():
            yield


def argument_roots(call: BlockCall) -> list[tuple[str, Any]]:
    """(label, object) of what a call gives its block besides tensors, containers and numbers."""
    return [
        (f"its argument {index}", leaf)
        for index, leaf in enumerate(call.leaves)
        if not isinstance(leaf, (torch.Tensor, bool, int, float, str, type(None))) and not is_cache(leaf)
    ]


class StateWatch:
    """Takes the state of one block at every call.

    Modules are walked when something in them changed since the last call; else they are compared, which is cheap.
    """

    def __init__(self, name: str, block: nn.Module) -> None:
        self._root = (name, block)
        self._known: tuple[Reach, list[_Mark]] | None = None

    def take(self, call: BlockCall, *, draws: bool) -> CallState:
        """The state now, before a forward with ``call``; ``draws``: from Python's or NumPy's generators too."""
        if self._known is None or self._known[0].changed():
            found = reach([self._root])
            marks = _marks(found)
        else:
            found = self._known[0]
            marks = [mark.again() for mark in self._known[1]]
        # A block that keeps its activations as attributes must be able to drop them: hold none from call to call.
        self._known = None if self._keeps_activations(found) else (found, marks)
        roots = argument_roots(call)
        arguments = reach(roots) if roots else None
        if arguments is not None and not (arguments.cells or arguments.tensors or arguments.generators):
            arguments = None
        return CallState(found, marks, arguments, draws=draws)

    def _keeps_activations(self, found: Reach) -> bool:
        suspects = [t for t in _of_modules(found) if t.grad_fn is not None or t.dim() >= 2]
        if not suspects:
            return False
        buffers = {id(buffer) for buffer in self._root[1].buffers()}
        return any(id(tensor) not in buffers for tensor in suspects)
