"""The state key of a block, read anew only when something that it reads is another object.

A key has all attributes of all modules of a block, and is asked for at every call, before anything can be launched; to
see that the same objects are in the same places is much less. The cells of ``blocks/cells.py`` say that too, but hold
what they compare, to put it back: what a block has dropped, and its weights, must not be kept alive here.

Only Python's own containers are looked at so, and objects by their dictionaries and slots; where anything else is met,
or something changes at every call, keys are read as before.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.places import PLAIN, is_small_array
from memo_runtime.capture.key import Key, Seen, attributes_of, is_opaque, state_key, tensors_key

_TABLES = (dict, OrderedDict, defaultdict, MappingProxyType)
_ROWS = (list, set, deque)
_FIXED = (tuple, frozenset)
#: After so many changes in a row it is not watched for so many calls.
_RESTLESS, _PAUSE = 3, 64


class StateWatch:
    """``state_key`` of ``block``, at every call of ``key``.

    Between two calls it holds containers that the state had at the last one, and modules, tensors and other objects by
    weak references only.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._key: Key = ()
        self._there: _There | None = None
        self._changes = 0

    def key(self) -> Key:
        """The key of the state as it is now; raises what ``state_key`` does."""
        if self._there is not None and self._there.unchanged():
            self._changes = 0
            return self._key
        self._there = None
        self._changes += 1
        seen: Seen = {}
        self._key = state_key(self._block, seen)
        if self._changes <= _RESTLESS:
            self._there = _There.of(self._block, seen)
        elif self._changes > _RESTLESS + _PAUSE:
            self._changes = 0
        return self._key


class _UnwatchableError(Exception):
    """Something is there whose changes are not seen by looking at what it holds."""


class _Content:
    """The objects that somebody held, of which those that can be are referred to weakly."""

    __slots__ = ("_hard", "_soft")

    def __init__(self, values: Collection[Any]) -> None:
        if any(type(value) is weakref.ReferenceType for value in values):
            raise _UnwatchableError
        self._hard = [value if _is_held(value) else _reference(value) or value for value in values]
        self._soft = any(type(one) is weakref.ReferenceType for one in self._hard)

    def same(self, now: Collection[Any]) -> bool:
        """``now`` are the very same, in the same order."""
        if len(now) != len(self._hard):
            return False
        if not self._soft:
            return all(map(is_, now, self._hard))
        kind = weakref.ReferenceType
        # What has gone is no object's, and not None.
        return all(
            value is not None and one() is value if type(one) is kind else one is value
            for value, one in zip(now, self._hard, strict=True)
        )


def _is_held(value: Any) -> bool:
    """It is referred to as it is: a value, or a container, which cannot be referred to otherwise."""
    return isinstance(value, PLAIN) or type(value) in (*_TABLES, *_ROWS, *_FIXED)


def _reference(value: Any) -> weakref.ReferenceType[Any] | None:
    try:
        return weakref.ref(value)
    except TypeError:  # a class without a place for it
        return None


def _finder(value: Any) -> Callable[[], Any]:
    return _reference(value) or (lambda: value)


class _Object:
    """An object by its class, dictionary and slots, referred to weakly, as all that it has."""

    __slots__ = ("_attributes", "_find", "_kind", "_names", "_skipped", "_slots", "_tensors")

    def __init__(self, value: Any) -> None:
        attributes = getattr(value, "__dict__", {})
        if type(attributes) is not dict:
            raise _UnwatchableError
        self._find = _finder(value)
        self._kind = type(value)
        self._names = [*attributes]
        # These hold tensors and modules; what is in them is asked of the module.
        skipped = _OWN_TABLES if isinstance(value, nn.Module) else ()
        self._skipped = [at for at, name in enumerate(self._names) if name in skipped][::-1]
        self._attributes = _Content(self._values(attributes))
        slotted = any(getattr(kind, "__slots__", ()) for kind in self._kind.__mro__)
        found = attributes_of(value) if slotted else []
        self._slots = ([name for name, _ in found], _Content([one for _, one in found])) if slotted else None
        self._tensors = tensors_key(value) if isinstance(value, nn.Module) else None

    def _values(self, attributes: Mapping[str, Any]) -> list[Any]:
        found = [*attributes.values()]
        for at in self._skipped:
            del found[at]
        return found

    def same(self) -> bool:
        """It is there, and has what it had."""
        value = self._find()
        attributes = getattr(value, "__dict__", {})
        if type(value) is not self._kind or not _same_keys(attributes, self._names):
            return False
        if not self._attributes.same(self._values(attributes)):
            return False
        if self._slots is not None:
            found = attributes_of(value)
            if [name for name, _ in found] != self._slots[0] or not self._slots[1].same([one for _, one in found]):
                return False
        return self._tensors is None or tensors_key(value) == self._tensors


class _Children:
    """The modules in a module."""

    __slots__ = ("_content", "_find", "_names")

    def __init__(self, module: nn.Module) -> None:
        if type(module._modules) not in _TABLES:
            raise _UnwatchableError
        self._find = _finder(module)
        self._names = [*module._modules]
        self._content = _Content(module._modules.values())

    def same(self) -> bool:
        """They are the same."""
        module = self._find()
        return (
            module is not None
            and _same_keys(module._modules, self._names)
            and self._content.same(module._modules.values())
        )


@dataclass(frozen=True, slots=True)
class _There:
    """What was where: containers with what they held, those that held nothing, objects, and arrays with elements."""

    empty: Sequence[Any]
    tables: Sequence[tuple[Mapping[Any, Any], list[Any], _Content]]
    rows: Sequence[tuple[Any, _Content]]
    objects: Sequence[_Object | _Children]
    arrays: Sequence[tuple[Callable[[], Any], tuple[int, ...], str, bytes]]

    @classmethod
    def of(cls, block: nn.Module, seen: Seen) -> _There | None:
        """What is in ``block`` and in all that its key has ``seen``; None where it cannot be watched."""
        try:
            return _collected(block, seen)
        except Exception:  # whatever the state's own classes raise: keys are read as before
            return None

    def unchanged(self) -> bool:
        """Everything is where it was."""
        try:
            return (
                not any(map(len, self.empty))
                and all(_same_keys(one, keys) and values.same(one.values()) for one, keys, values in self.tables)
                and all(values.same(row) for row, values in self.rows)
                and all(one.same() for one in self.objects)
                and all(map(_same_array, self.arrays))
            )
        except Exception:  # as above
            return False


#: Tables of a module that hold what takes memory.
_OWN_TABLES = ("_parameters", "_buffers", "_modules")


def _collected(block: nn.Module, seen: Seen) -> _There:
    modules = [*block.modules()]
    objects: list[_Object | _Children] = [made(module) for module in modules for made in (_Object, _Children)]
    held: list[Any] = []
    arrays: list[tuple[Callable[[], Any], tuple[int, ...], str, bytes]] = []
    for value, depth, _ in seen.values():
        if is_small_array(value):
            arrays.append((_finder(value), value.shape, value.dtype.str, value.tobytes()))
        elif isinstance(value, (Mapping, *_ROWS, *_FIXED)):
            # Also those that are told apart by identity: whoever holds them is held.
            _check_plain(value)
            held += [value] if depth and type(value) not in _FIXED else []
        elif depth and not is_opaque(value):
            objects.append(_Object(value))
    full = [one for one in held if len(one)]
    return _There(
        empty=[one for one in held if not len(one)],
        tables=[(one, [*one], _Content(one.values())) for one in full if type(one) in _TABLES],
        rows=[(one, _Content(one)) for one in full if type(one) in _ROWS],
        objects=objects,
        arrays=arrays,
    )


def _check_plain(value: Any) -> None:
    """Refuse a container of another kind than Python's own, or with tensors or modules, which it would keep alive."""
    kind: Any = type(value)
    if kind not in (*_TABLES, *_ROWS, *_FIXED):
        raise _UnwatchableError
    inside = [*value, *value.values()] if kind in _TABLES else value
    if any(isinstance(one, (torch.Tensor, nn.Module)) for one in inside):
        raise _UnwatchableError


def _same_keys(table: Mapping[Any, Any], keys: list[Any]) -> bool:
    return len(table) == len(keys) and all(map(is_, table, keys))


def _same_array(there: tuple[Callable[[], Any], tuple[int, ...], str, bytes]) -> bool:
    found, shape, kind, content = there
    array = found()
    return array is not None and (array.shape, array.dtype.str, array.tobytes()) == (shape, kind, content)
