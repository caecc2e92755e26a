"""What the profile's runs of a block start from, so that training does not notice them.

A block is run some fifty times before its first step. Every run starts from the same state, as reruns in training do,
and at the end everything is put back: attributes, containers and objects by reference, buffers and tensors that were
written to by value, the generators of PyTorch, Python and NumPy, and what the first run leads to outside of the block
(a global list to which it appends, an attribute of its class that it counts up).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode

from memo_runtime.blocks.ambient import BufferState, RandomState
from memo_runtime.blocks.aside import Aside, is_aside
from memo_runtime.blocks.containers import flatten
from memo_runtime.blocks.dispatch import OutsideCompiled
from memo_runtime.blocks.operators import is_mutable, written_by
from memo_runtime.blocks.outside import Outside
from memo_runtime.blocks.parametrized import ComputedWeights
from memo_runtime.blocks.reach import Reach, reach
from memo_runtime.blocks.rerun import Forward, storage_key
from memo_runtime.blocks.state import MOST_CLONED_BYTES, LibraryRandom, shared_generators
from memo_runtime.blocks.undo import Undo

#: Bytes of tensors outside of a module that are kept (what hooks sum up): few, since memory in use is measured beside.
_ROOM = 1024**2
Roots = Iterable[tuple[str, Any]]


class Start:
    """The state at one point.

    Args:
        roots: (label, object) of everything that a forward may reach.
        device: whose random state is kept.
        clone: take the values of all tensors of moderate size now; False: of buffers, and of the others before
            ``FirstWrites`` sees them written to.
        elements: nobody but what runs exchanges the elements of parameters (an assignment to ``.data``).
    """

    def __init__(self, roots: Roots, device: torch.device, *, clone: bool = False, elements: bool = True) -> None:
        roots = list(roots)
        self._found = reach(roots)
        self._torch = RandomState.current(device)
        self._random = LibraryRandom.current([*self._found.generators, *shared_generators()])
        self._weights = ComputedWeights.current()
        modules = [root for _, root in roots if isinstance(root, nn.Module)]
        self._unseen = modules
        self._outside: list[Outside] = []
        buffers = {id(buffer) for module in modules for buffer in module.buffers()}
        self._values: list[BufferState] = []
        self._versions: list[tuple[torch.Tensor, int]] = []
        self._unwritten: dict[int, list[torch.Tensor]] = {}
        #: Parameters, and their elements.
        self._elements: list[tuple[torch.Tensor, torch.Tensor]] = []
        for _, tensor in self._found.tensors:
            strided = tensor.layout is torch.strided  # sparse ones have no memory of their own to look at
            if hasattr(tensor, "__tensor_flatten__") or tensor.is_inference() or not strided:
                continue
            small = clone and not isinstance(tensor, nn.Parameter) and _bytes(tensor) <= MOST_CLONED_BYTES
            if id(tensor) in buffers or small:
                self._take(tensor)
            else:
                self._unwritten.setdefault(storage_key(tensor), []).append(tensor)
            if elements and isinstance(tensor, nn.Parameter) and not hasattr(tensor, "ds_id"):  # ZeRO's come and go
                self._elements.append((tensor, tensor.detach()))
        #: What the runs did since: wrote to tensors in place, drew from Python's or NumPy's generators, left something
        #: in Python state, where blocks behind may look for it.
        self.wrote = False
        self.drew = False
        self.left = False
        #: Leaves of the arguments that every result so far was like; None: there was no run.
        self._like: set[int] | None = None

    def _take(self, tensor: torch.Tensor) -> None:
        self._values.append(BufferState.current([tensor]))
        self._versions.append((tensor, tensor._version))

    def before_write(self, tensor: torch.Tensor) -> None:
        """``tensor`` is about to be written to for the first time: remember its values."""
        for known in self._unwritten.pop(storage_key(tensor), ()):
            self._take(known)

    def set(self, *, look: bool = True) -> None:
        """Make it the current state; PyTorch's generators go on, so that what draws from them shows.

        ``look``: at values, to find what was written past autograd; that waits for the device.
        """
        self.wrote = self.wrote or any(tensor._version != version for tensor, version in self._versions)
        self.drew = self.drew or self._random.advanced()
        self.left = self.left or bool(self._found.changed()) or any(outside.changed() for outside in self._outside)
        # First: they were looked at when this was, or later, in the middle of a forward that had written already.
        for outside in reversed(self._outside):
            outside.put_back()
        self._put_elements_back()
        for values in self._values:
            self.wrote = self.wrote or (look and values.changed())
            values.set()
        for index in self._found.changed():
            self._found.cells[index].write(self._found.contents[index])
        self._random.set()
        # A run may go backward, and not into the graphs of others.
        self._weights.mapped(without_graph).set()

    def _put_elements_back(self) -> None:
        for parameter, elements in self._elements:
            if storage_key(parameter) != storage_key(elements):
                self.wrote = True
                parameter.data = elements

    def first_run(self) -> contextlib.AbstractContextManager[object]:
        """Around every run: the first one shows what runs may change outside of the block."""
        unseen, self._unseen = self._unseen, []
        stack = contextlib.ExitStack()
        for module in unseen:
            stack.enter_context(self.outside(module))
        return stack

    def outside(self, module: nn.Module) -> Outside:
        """Around a run of ``module``, whose changes outside of it are put back too."""
        self._outside.append(Outside(module, room=_ROOM))
        return self._outside[-1]

    def left_outside(self) -> str:
        """Words for what the last run has changed outside of the block, before it is put back; "": nothing."""
        return next((words for one in self._outside if (words := one.written())), "")

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever runs inside, the state is this one afterwards.

        Gradients, which change where a forward calls backward, are put aside, so that what it leaves can be seen. So
        are hooks on parameters: they are the loop's, for gradients of its batch.
        """
        leaves = [t for _, t in self._found.tensors if isinstance(t, nn.Parameter) and t.is_leaf]
        gradients = [(parameter, parameter.grad) for parameter in leaves]

        def put_back() -> None:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            hooks()
            self.set()
            self._weights.set()
            self._torch.set()

        hooks, undo = self._found.without_leaf_hooks(), Undo(put_back)
        try:
            for parameter in leaves:
                parameter.grad = None
            yield
        finally:
            undo()

    def every_time(self, forward: Forward) -> Forward:
        """``forward`` such that every run starts from here."""
        return _FromHere(forward, self)

    def note_result(self, output: Any, given: Sequence[Any]) -> None:
        """A run has yielded ``output`` for these leaves."""
        alike = {at for at, leaf in enumerate(given) if isinstance(leaf, torch.Tensor) and is_like(output, leaf)}
        self._like = alike if self._like is None else self._like & alike

    def yields_like(self, leaf: int) -> bool:
        """Whether every run yielded a tensor like that leaf of its arguments."""
        return self._like is not None and leaf in self._like


def is_like(output: Any, given: torch.Tensor) -> bool:
    """Whether ``output`` is a tensor of the shape and dtype of ``given``."""
    return isinstance(output, torch.Tensor) and output.shape == given.shape and output.dtype == given.dtype


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True, slots=True)
class _FromHere:
    forward: Forward
    start: Start

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with Aside():
            self.start.set()
        given, how = flatten((args, kwargs))
        with FirstWrites(self.start), self.start.first_run():
            output = self.forward(*args, **kwargs)
        # Containers are copies here, made for this run.
        there, as_it_is = flatten((args, kwargs))
        if how != as_it_is or not all(map(is_, given, there)):
            self.start.left = True
        self.start.note_result(output, given)
        return output


class FirstWrites(OutsideCompiled):
    """Tells a Start of every tensor that is about to be written to."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        self._start = start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Without it, unless a mode was entered inside: what is timed must not go through Python for each operator."""
        if _get_current_dispatch_mode() is not self:
            yield
            return
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self.__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_mutable(func) and not is_aside():
            for tensor in _pytree.tree_leaves(written_by(func, args, kwargs)):
                if isinstance(tensor, torch.Tensor):
                    self._start.before_write(tensor)
        return func(*args, **kwargs)


def cut_graphs(before: Reach, roots: Roots) -> bool:
    """Detach what a run left in the state of ``roots``, since its graph is never walked; True: it left something.

    ``before`` is what was reached before the run.
    """
    known = {id(cell.holder): index for index, cell in enumerate(before.cells)}
    changed = set(before.changed())
    after = reach(roots)
    left = bool(changed)
    for cell, content in zip(after.cells, after.contents, strict=True):
        index = known.get(id(cell.holder))
        if index is not None and index not in changed:
            continue
        cut = _without_graphs(content)
        if cut is not None:
            cell.write(cut)
            left = True
    return left


def _without_graphs(content: Any) -> Any:
    """A content whose tensors have no graph; None: it holds no tensor that has one."""
    if isinstance(content, dict):
        found = {key: _cut(value) for key, value in content.items() if _has_graph(value)}
        return {**content, **found} if found else None
    if isinstance(content, list) and any(_has_graph(value) for value in content):
        return [_cut(value) for value in content]
    return None


def _has_graph(value: Any) -> bool:
    """A tensor with a graph, or a tuple with one inside, which is no place of its own."""
    if _is_tuple(value):
        return any(map(_has_graph, value))
    return isinstance(value, torch.Tensor) and value.grad_fn is not None


def _is_tuple(value: Any) -> bool:
    return type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_make"))


def _cut(value: Any) -> Any:
    if not _has_graph(value):
        return value
    if not _is_tuple(value):
        return without_graph(value)
    parts = map(_cut, value)
    return tuple(parts) if type(value) is tuple else value._make(parts)


def without_graph(leaf: Any) -> Any:
    """A result that requires grad as it did and holds no graph of its block.

    No leaf either where it requires grad: the next module may write into it.
    """
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().requires_grad_().clone() if leaf.requires_grad else leaf.detach()
