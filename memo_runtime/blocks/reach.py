"""What a block can reach and change: a bounded walk from modules and arguments to cells, tensors and generators.

Nearest first, so that what a bound leaves out is what is farthest away. Not entered: functions and their closures,
objects of the standard library and of PyTorch (modules aside), and the runtime's own.
"""

from __future__ import annotations

import enum
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.cells import (
    ArrayCell,
    Cell,
    DictCell,
    HooksCell,
    LeafHooksCell,
    SequenceCell,
    SetCell,
    SlotsCell,
)
from memo_runtime.blocks.undo import Undo

#: Bounds of a walk, so that a module that holds its trainer, or a data set, costs no more than this.
_MOST_CELLS = 8192
_MOST_MEMBERS = 8192
_MOST_ELEMENTS = 1 << 16

_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, range, slice))
_TABLES = ("_parameters", "_buffers", "_modules")
#: Attributes of every module that are not entered: hook tables, which are a cell of their own, and their like.
_NOT_STATE = frozenset(vars(nn.Module())) - {"training", *_TABLES}
_STATEFUL_LIBRARY = ("types", "collections")
#: Modules whose attributes mirror what their engine holds elsewhere: put back, the two would disagree.
_ENGINES = ("torch.nn.parallel", "torch.distributed", "torch._dynamo", "deepspeed", "memo_runtime")


@dataclass(slots=True)
class Reach:
    """Everything found, with labels to name it in messages; ``contents`` is what each cell held."""

    cells: list[Cell] = field(default_factory=list)
    contents: list[Any] = field(default_factory=list)
    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    generators: list[Any] = field(default_factory=list)

    @property
    def has_leaf_hooks(self) -> bool:
        """A parameter or another leaf had a hook."""
        return bool(self.contents[-1])

    def without_leaf_hooks(self) -> Undo:
        """Take the hooks of leaves away, from ``contents`` too; undone, they are in both again."""
        before = self.contents[-1]

        def put_back() -> None:
            self.contents[-1] = before
            self.cells[-1].write(before)

        undo = Undo(put_back)
        self.contents[-1] = []
        self.cells[-1].write([])
        return undo

    def changed(self) -> list[int]:
        """Indices of the cells that hold something else now."""
        return [i for i, cell in enumerate(self.cells) if not cell.same(self.contents[i])]


@lru_cache(maxsize=4096)
def _may_hold_state(kind: type) -> bool:
    """Objects of class ``kind`` are entered."""
    if issubclass(kind, (enum.Enum, type, ModuleType)):
        return False
    package = kind.__module__.partition(".")[0]
    if package in ("torch", "memo_runtime", "numpy", "triton", "builtins"):
        return False
    return package in _STATEFUL_LIBRARY or package not in sys.stdlib_module_names


@lru_cache(maxsize=4096)
def _slots(kind: type) -> tuple[str, ...]:
    names: list[str] = []
    for base in kind.__mro__:
        given = base.__dict__.get("__slots__", ())
        names += [given] if isinstance(given, str) else list(given)
    return tuple(name for name in dict.fromkeys(names) if name not in ("__dict__", "__weakref__"))


@lru_cache(maxsize=4096)
def _is_engine(kind: type) -> bool:
    # fully_shard derives a class from the module's own, whose attributes are the user's.
    return kind.__module__.startswith(_ENGINES) and all(base.__name__ != "FSDPModule" for base in kind.__mro__)


def is_generator(value: Any) -> bool:
    """Of Python's, NumPy's or PyTorch's kind of random number generators."""
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    numpy_random = sys.modules.get("numpy.random")
    return numpy_random is not None and isinstance(value, (numpy_random.Generator, numpy_random.RandomState))


def reach(roots: Iterable[tuple[str, Any]]) -> Reach:
    """Walk from ``roots``, (label, object) each, and read every cell on the way; hooks of leaves are in the last."""
    found = Reach()
    seen: set[int] = set()
    queue: deque[tuple[str, Any]] = deque(roots)
    while queue and len(found.cells) < _MOST_CELLS:
        label, value = queue.popleft()
        if type(value) in _ATOMS or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.tensors.append((label, value))
        elif is_generator(value):
            found.generators.append(value)
        elif isinstance(value, (tuple, frozenset)):
            if len(value) <= _MOST_MEMBERS:
                queue.extend((label, member) for member in value)
        else:
            for cell in _cells_of(label, value):
                content = cell.read()
                found.cells.append(cell)
                found.contents.append(content)
                queue.extend(
                    pair for pair in cell.values(content)
                    if type(pair[1]) not in _ATOMS and id(pair[1]) not in seen
                )  # fmt: skip
    hooks = LeafHooksCell("hooks of parameters", [one for _, one in found.tensors if one.is_leaf and one.requires_grad])
    found.cells.append(hooks)
    found.contents.append(hooks.read())
    return found


def _cells_of(label: str, value: Any) -> list[Cell]:
    kind = type(value)
    if isinstance(value, nn.Module):
        return _module_cells(label, value)
    cells: list[Cell] = []
    if isinstance(value, (dict, list, set, deque)):
        if len(value) <= _MOST_MEMBERS:
            cells.append(_container_cell(label, value))
        if kind in (dict, list, set, deque, OrderedDict, defaultdict):
            return cells
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        small = value.size <= _MOST_ELEMENTS and not value.dtype.hasobject and value.flags.writeable
        return [ArrayCell(label, value)] if small else []
    if not _may_hold_state(kind):  # type: ignore[arg-type]
        return cells
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict and len(attributes) <= _MOST_MEMBERS:
        cells.append(DictCell(label, attributes))
    slots = _slots(kind)  # type: ignore[arg-type]
    if slots:
        cells.append(SlotsCell(label, value, slots))
    return cells


def _container_cell(label: str, value: Any) -> Cell:
    if isinstance(value, dict):
        return DictCell(label, value)
    return SetCell(label, value) if isinstance(value, set) else SequenceCell(label, value)


class _ModuleCell(DictCell):
    """Attributes of a module; its tables are cells of their own, and so are its hooks."""

    __slots__ = ()

    def values(self, content: dict[Any, Any]) -> list[tuple[str, Any]]:
        return [
            (f"{self.label}.{key}", value)
            for key, value in content.items()
            if type(value) not in _ATOMS and key not in _NOT_STATE and key not in _TABLES
        ]


def _module_cells(label: str, module: nn.Module) -> list[Cell]:
    if isinstance(module, torch.jit.ScriptModule):
        # Its tables are not Python's: nothing but its tensors can be seen, and put back.
        return [DictCell(label, {**dict(module.named_parameters()), **dict(module.named_buffers())})]
    children = module.__dict__.get("_modules")
    cells: list[Cell] = [DictCell(label, children)] if children else []
    if _is_engine(type(module)):  # type: ignore[arg-type]
        return cells
    own = [DictCell(label, module.__dict__[name]) for name in ("_parameters", "_buffers") if name in module.__dict__]
    return [_ModuleCell(label, module.__dict__), HooksCell(label, module.__dict__), *own, *cells]
