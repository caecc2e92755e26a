"""Cells: the mutable places of Python state, each of which can be read, compared by identity, and written back.

    attributes      vars(object), a module's _parameters, _buffers and _modules among them; __slots__
    containers      dict, list, set, deque
    hooks           of a module, all its tables together, and those of all parameters
    arrays          of NumPy, by value

Reading copies references, never what they point to. Writing touches only what differs.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from operator import is_
from typing import Any, Protocol

import torch

_ABSENT = object()


class Cell(Protocol):
    """One mutable place; ``label`` says where it is."""

    label: str
    holder: Any

    def read(self) -> Any:
        """What it holds now, to be compared with and written later."""

    def same(self, before: Any) -> bool:
        """It holds the very objects of ``before``."""

    def write(self, before: Any) -> None:
        """Make it hold ``before`` again."""

    def values(self, content: Any) -> list[tuple[str, Any]]:
        """The (labelled) objects of a content, to search them for more cells."""


def is_intact(tensor: torch.Tensor) -> bool:
    """The tensor's storage has its elements: engines that gather parameters free the storage and keep the tensor."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type == "meta":
        return True
    if tensor.layout is not torch.strided:
        return True
    return not tensor.numel() or tensor.untyped_storage().nbytes() > 0


def _of_an_engine(now: Any, before: Any) -> bool:
    """Sharded and gathered parameters change places (FSDP): which of the two is right now, its engine knows."""
    pair = [value for value in (now, before) if isinstance(value, torch.Tensor)]
    sharded = any(hasattr(value, "_local_tensor") for value in pair)
    return sharded or (isinstance(before, torch.Tensor) and not is_intact(before))


class DictCell:
    """A dict, or the attributes of an object."""

    __slots__ = ("_base", "holder", "label")

    def __init__(self, label: str, holder: dict[Any, Any]) -> None:
        self.label = label
        self.holder = holder
        # Subclasses may do more when they are written to (Hugging Face's outputs set an attribute too).
        self._base: Any = OrderedDict if isinstance(holder, OrderedDict) else dict

    def read(self) -> dict[Any, Any]:
        """A copy with the same values."""
        return dict(self._base.items(self.holder))

    def same(self, before: dict[Any, Any]) -> bool:
        """Same keys in the same order, same values."""
        now = self.holder
        return len(now) == len(before) and all(map(is_, now.values(), before.values())) and all(map(is_, now, before))

    def write(self, before: dict[Any, Any]) -> None:
        """Give every key the value that it had."""
        base, now = self._base, self.holder
        wanted = {}
        for key, value in before.items():
            current = now.get(key, _ABSENT)
            wanted[key] = current if current is not value and _of_an_engine(current, value) else value
        for key in [key for key in now if key not in wanted]:
            if not _of_an_engine(now[key], None):
                base.__delitem__(now, key)
        wanted = {key: value for key, value in wanted.items() if value is not _ABSENT}
        if list(now) != list(wanted) and set(now) <= set(wanted):
            for key in list(now):
                base.__delitem__(now, key)
        for key, value in wanted.items():
            if now.get(key, _ABSENT) is not value:
                base.__setitem__(now, key, value)

    def values(self, content: dict[Any, Any]) -> list[tuple[str, Any]]:
        """Values with their keys."""
        names = (f"{self.label}.{key}" if isinstance(key, str) else self.label for key in content)
        return list(zip(names, content.values(), strict=True))


class SequenceCell:
    """A list or deque."""

    __slots__ = ("holder", "label")

    def __init__(self, label: str, holder: list[Any] | deque[Any]) -> None:
        self.label = label
        self.holder = holder

    def read(self) -> list[Any]:
        """Its members."""
        return list(self.holder)

    def same(self, before: list[Any]) -> bool:
        """The same members in the same order."""
        return len(self.holder) == len(before) and all(map(is_, self.holder, before))

    def write(self, before: list[Any]) -> None:
        """Exchange all members."""
        if self.same(before):
            return
        if isinstance(self.holder, list):
            list.__setitem__(self.holder, slice(None), before)
        else:
            deque.clear(self.holder)
            deque.extend(self.holder, before)

    def values(self, content: list[Any]) -> list[tuple[str, Any]]:
        """Members with their places."""
        return [(f"{self.label}[{index}]", value) for index, value in enumerate(content)]


class SetCell:
    """A set."""

    __slots__ = ("holder", "label")

    def __init__(self, label: str, holder: set[Any]) -> None:
        self.label = label
        self.holder = holder

    def read(self) -> set[Any]:
        """Its members."""
        return set(self.holder)

    def same(self, before: set[Any]) -> bool:
        """The same members."""
        return len(self.holder) == len(before) and self.holder == before

    def write(self, before: set[Any]) -> None:
        """Exchange all members."""
        if not self.same(before):
            set.clear(self.holder)
            set.update(self.holder, before)

    def values(self, content: set[Any]) -> list[tuple[str, Any]]:
        """Members."""
        return [(self.label, value) for value in content]


class SlotsCell:
    """The ``__slots__`` of an object."""

    __slots__ = ("_names", "holder", "label")

    def __init__(self, label: str, holder: Any, names: tuple[str, ...]) -> None:
        self.label = label
        self.holder = holder
        self._names = names

    def read(self) -> dict[str, Any]:
        """Values of the slots that have one."""
        found = {name: getattr(self.holder, name, _ABSENT) for name in self._names}
        return {name: value for name, value in found.items() if value is not _ABSENT}

    def same(self, before: dict[str, Any]) -> bool:
        """The same values."""
        return all(getattr(self.holder, name, _ABSENT) is before.get(name, _ABSENT) for name in self._names)

    def write(self, before: dict[str, Any]) -> None:
        """Set and delete what differs; frozen dataclasses too."""
        for name in self._names:
            value, now = before.get(name, _ABSENT), getattr(self.holder, name, _ABSENT)
            if value is now:
                continue
            if value is _ABSENT:
                object.__delattr__(self.holder, name)
            else:
                object.__setattr__(self.holder, name, value)

    def values(self, content: dict[str, Any]) -> list[tuple[str, Any]]:
        """Values with their names."""
        return [(f"{self.label}.{name}", value) for name, value in content.items()]


#: Hooks that a call of a module runs. Those of state_dict and its like are no part of a forward.
_HOOK_TABLES = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_backward_pre_hooks", "_backward_hooks",
)  # fmt: skip


class HooksCell:
    """The hooks of a module: what a forward registers goes with the attribute that says it was registered."""

    __slots__ = ("_found", "holder", "label")

    def __init__(self, label: str, attributes: dict[str, Any]) -> None:
        self.label = label
        found = (attributes.get(name) for name in _HOOK_TABLES)
        self._found = [table for table in found if isinstance(table, dict)]
        # One of the tables: the attributes are the holder of another cell.
        self.holder: Any = self._found[0] if self._found else self._found

    def read(self) -> list[tuple[Any, ...]]:
        """The members of every table; nothing where no table has any, which is the usual case."""
        tables = self._tables()
        return [tuple(table.items()) if table else () for table in tables] if any(tables) else []

    def same(self, before: list[tuple[Any, ...]]) -> bool:
        """The same hooks in the same order."""
        return self.read() == before

    def write(self, before: list[tuple[Any, ...]]) -> None:
        """Give every table the hooks that it had; it stays the same table, where handles and autograd find theirs."""
        tables = self._tables()
        for table, members in zip(tables, before or [()] * len(tables), strict=True):
            if table is not None and tuple(table.items()) != members:
                table.clear()
                table.update(members)

    def values(self, content: list[tuple[Any, ...]]) -> list[tuple[str, Any]]:
        """None: functions are not entered."""
        return []

    def _tables(self) -> Sequence[dict[Any, Any] | None]:
        return self._found


#: Where a leaf of autograd has what `register_hook` and `register_post_accumulate_grad_hook` were given; None before.
_LEAF_TABLES = ("_backward_hooks", "_post_accumulate_grad_hooks")


class LeafHooksCell(HooksCell):
    """The hooks of parameters and other leaves, all together.

    Args:
        label: where they are. leaves: tensors that require a gradient and that no operator has made.
    """

    __slots__ = ()

    def __init__(self, label: str, leaves: list[torch.Tensor]) -> None:
        self.label = label
        self.holder = leaves

    def _tables(self) -> Sequence[dict[Any, Any] | None]:
        # Looked up each time: the first hook makes the table. A tensor's own class may have attributes go by it.
        with torch._C.DisableTorchFunctionSubclass():
            return [getattr(leaf, name, None) for leaf in self.holder for name in _LEAF_TABLES]


class ArrayCell:
    """A NumPy array, by value."""

    __slots__ = ("holder", "label")

    def __init__(self, label: str, holder: Any) -> None:
        self.label = label
        self.holder = holder

    def read(self) -> Any:
        """A copy."""
        return self.holder.copy()

    def same(self, before: Any) -> bool:
        """The same bytes, so that a NaN equals itself."""
        return bool(self.holder.tobytes() == before.tobytes())

    def write(self, before: Any) -> None:
        """Copy the elements back."""
        if self.holder.shape == before.shape and not self.same(before):
            self.holder[...] = before

    def values(self, content: Any) -> list[tuple[str, Any]]:
        """None that are mutable."""
        return []
