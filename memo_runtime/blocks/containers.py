"""What a call is given and what it yields, as flat leaves.

Lists, tuples, dicts, named tuples and what libraries register (transformers' outputs) are PyTorch's to open. Objects of
dataclasses, frozen ones too, are opened here where tensors are inside and their fields are all that they are: one of
the same class with other values in its fields is then what the caller could have given. So are a ``UserDict`` and what
derives from it, which hold one dict and nothing else, whatever is in it: blocks fill it (keys and values that others
read) as they fill a dict. Others stay leaves.
"""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterable
from functools import lru_cache
from types import MemberDescriptorType
from typing import Any

import torch
from torch.utils import _pytree

_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Tensor))


class _Opened:
    """An object on its way into a tree of PyTorch's: that knows this class, and makes the object's own again."""

    __slots__ = ("kind", "names", "values")

    def __init__(self, kind: type, names: tuple[str, ...], values: list[Any]) -> None:
        self.kind = kind
        self.names = names
        self.values = values


def _made(values: Iterable[Any], context: tuple[type, tuple[str, ...]]) -> Any:
    """An object with these values, without its ``__init__``: what that does was done when there were others."""
    kind, names = context
    made: Any = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)  # frozen ones too
    return made


_pytree.register_pytree_node(
    _Opened,
    lambda opened: (opened.values, (opened.kind, opened.names)),
    _made,
    serialized_type_name="memo_runtime.blocks.containers.opened",
)


#: By shape of a tree of Python's own containers, how to put it together; by identity of that, its text.
_SPECS: dict[tuple[Any, ...], Any] = {}
_TEXTS: dict[int, str] = {}
#: So many are remembered, of trees with so many parts: a list of numbers may be of another length at every call.
_MOST_SPECS, _MOST_PARTS = 1 << 10, 256


def flatten(value: Any) -> tuple[list[Any], Any]:
    """(leaves, how to put them together again); of the same object for trees that are alike."""
    leaves: list[Any] = []
    shape: list[Any] = []
    if not _take_apart(value, leaves, shape):
        return _flatten_any(value)
    key = tuple(shape)
    found = _SPECS.get(key)
    if found is None:
        _, found = _pytree.tree_flatten(value)
        if len(_SPECS) < _MOST_SPECS and len(key) <= _MOST_PARTS:
            made, found = found, _SPECS.setdefault(key, found)
            if made is found:  # another thread's is remembered otherwise, and this one goes
                _TEXTS[id(found)] = str(found)
    return leaves, found


def text_of(spec: Any) -> str:
    """``str(spec)``, which takes longer than to flatten."""
    return _TEXTS.get(id(spec)) or str(spec)


def _take_apart(value: Any, leaves: list[Any], shape: list[Any]) -> bool:
    """Add what is in ``value`` to ``leaves`` and ``shape``; False where that is PyTorch's to open."""
    kind: Any = type(value)
    if kind in _ATOMS or kind is torch.nn.Parameter:
        leaves.append(value)
        shape.append(None)
        return True
    if kind is dict:
        if not all(type(name) is str for name in value):
            return False
        shape += [dict, len(value), *value]
        return all(_take_apart(one, leaves, shape) for one in value.values())
    if kind is tuple or kind is list:
        shape += [kind, len(value)]
        return all(_take_apart(one, leaves, shape) for one in value)
    return False


def _flatten_any(value: Any) -> tuple[list[Any], Any]:
    leaves, spec = _pytree.tree_flatten(value)
    if not any(_may_open(leaf) for leaf in leaves):
        return leaves, spec
    return _pytree.tree_flatten(_with_objects_open(value, ()))


def unflatten(leaves: Iterable[Any], spec: Any) -> Any:
    """What ``flatten`` took apart, with other leaves."""
    return _pytree.tree_unflatten(leaves, spec)


def leaves_of(value: Any) -> list[Any]:
    """The leaves alone."""
    return flatten(value)[0]


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with ``function`` of every leaf."""
    leaves, spec = flatten(value)
    return unflatten([function(leaf) for leaf in leaves], spec)


def _with_objects_open(value: Any, inside: tuple[int, ...]) -> Any:
    """``value`` with each object that is to be opened as an ``_Opened``; ``inside``: objects that it is part of."""

    def opened(leaf: Any) -> Any:
        kind: Any = type(leaf)
        names = _names(kind) if kind not in _ATOMS else None
        if names is None or id(leaf) in inside or not _is_its_fields(leaf, names):
            return leaf
        values = [_with_objects_open(getattr(leaf, name), (*inside, id(leaf))) for name in names]
        # Settings and the like stay what they are: the very object that the caller gave.
        holds = any(isinstance(one, torch.Tensor) for one in _pytree.tree_leaves(values))
        if not holds and not issubclass(kind, UserDict):
            return leaf
        return _Opened(kind, names, values)

    return _pytree.tree_map(opened, value)


def _is_its_fields(value: Any, names: tuple[str, ...]) -> bool:
    """Nothing else was set on ``value``, and every field was."""
    return getattr(value, "__dict__", {}).keys() <= set(names) and all(hasattr(value, name) for name in names)


def _may_open(leaf: Any) -> bool:
    kind: Any = type(leaf)
    return kind not in _ATOMS and _names(kind) is not None


@lru_cache(maxsize=4096)
def _names(kind: Any) -> tuple[str, ...] | None:
    """Fields of a class whose objects may be opened, ``data`` of a ``UserDict``; None where they may not."""
    parameters = getattr(kind, "__dataclass_params__", None)
    if parameters is not None:
        names = tuple(field.name for field in dataclasses.fields(kind))
    elif isinstance(kind, type) and issubclass(kind, UserDict):
        names = ("data",)
    else:
        return None
    frozen = parameters is not None and bool(parameters.frozen)
    plain = kind.__getattribute__ is object.__getattribute__ and not hasattr(kind, "__getattr__")
    plain = plain and (frozen or kind.__setattr__ is object.__setattr__) and kind.__new__ is object.__new__
    # Those of PyTorch are not the user's: a sharding, a block mask, a graph.
    if not plain or kind.__module__.partition(".")[0] in ("torch", "memo_runtime"):
        return None
    return names if _holds_only(kind, names) else None


def _holds_only(kind: type, names: tuple[str, ...]) -> bool:
    """Objects of ``kind`` have no place beside ``names`` and their ``__dict__``, and no code in between."""
    for base in kind.__mro__[:-1]:
        for name, value in vars(base).items():
            slot = isinstance(value, MemberDescriptorType)
            if (slot and name not in names) or (name in names and hasattr(type(value), "__set__") and not slot):
                return False
        # A class that is derived from a list or a tensor has more than attributes.
        if base.__module__ == "builtins":
            return False
    return True
