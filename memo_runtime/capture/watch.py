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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
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
_NOTHING: dict[str, Any] = {}
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
    """The objects that somebody held; those that can be are referred to weakly, and those at ``unheld`` not at all."""

    __slots__ = ("_held", "_soft", "_unheld")

    def __init__(self, values: Collection[Any], unheld: Collection[int] = ()) -> None:
        if any(type(value) is weakref.ReferenceType for value in values):
            raise _UnwatchableError
        self._held: list[Any] = []
        self._soft: list[tuple[int, weakref.ReferenceType[Any]]] = []
        self._unheld: list[int] = []
        for at, value in enumerate(values):
            reference = None if at in unheld or _is_held(value) else _reference(value)
            if at in unheld:
                self._unheld.append(at)
            elif reference is not None:
                self._soft.append((at, reference))
            self._held.append(value if at not in unheld and reference is None else None)

    def same(self, now: Iterable[Any]) -> bool:
        """``now`` are the very same, in the same order."""
        found, held = [*now], self._held
        if len(found) != len(held):
            return False
        if self._soft or self._unheld:
            held = held.copy()
            for at, reference in self._soft:
                held[at] = reference()
                if held[at] is None:  # it has gone
                    return False
            for at in self._unheld:
                held[at] = found[at]
        return all(map(is_, found, held))


class _Tables:
    """What dictionaries held, all looked at together: a call for each takes longer than the look."""

    __slots__ = ("_names", "_sizes", "_values")

    def __init__(self, tables: Sequence[Mapping[Any, Any]], unheld: Collection[int] = ()) -> None:
        self._sizes = [*map(len, tables)]
        self._names = [*chain.from_iterable(tables)]
        self._values = _Content([*_values_of(tables)], unheld)

    def same(self, tables: Sequence[Mapping[Any, Any]]) -> bool:
        """Each of ``tables`` holds what it held, under the same names."""
        if [*map(len, tables)] != self._sizes:
            return False
        # What names are equal to is their own matter: 1 is equal to True, and a member of an Enum may be to its name.
        same = all(map(is_, chain.from_iterable(tables), self._names))
        return same and self._values.same(_values_of(tables))


def _values_of(tables: Iterable[Mapping[Any, Any]]) -> Iterable[Any]:
    return chain.from_iterable([one.values() for one in tables])


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


class _Objects:
    """Objects by their classes, dictionaries and slots, referred to weakly, as all that they have; modules first."""

    __slots__ = ("_attributes", "_children", "_find", "_kinds", "_modules", "_slots", "_tensors")

    def __init__(self, modules: Sequence[nn.Module], others: Sequence[Any]) -> None:
        values = [*modules, *others]
        attributes = _attributes(values)
        if any(type(one) is not dict for one in attributes):
            raise _UnwatchableError
        if any(type(one._modules) not in _TABLES for one in modules):
            raise _UnwatchableError
        self._find = [_finder(value) for value in values]
        self._kinds = [*map(type, values)]
        # These hold what takes memory, and what is in them is asked for itself.
        names = ((index, name) for index, table in enumerate(attributes) for name in table)
        own = {at for at, (index, name) in enumerate(names) if index < len(modules) and name in _OWN_TABLES}
        self._attributes = _Tables(attributes, own)
        self._modules = len(modules)
        self._children = _Tables([one._modules for one in modules])
        self._tensors = _tensors_of(modules)
        slotted = (at for at, kind in enumerate(self._kinds) if any(getattr(k, "__slots__", ()) for k in kind.__mro__))
        self._slots = [(at, _Tables([dict(attributes_of(values[at]))])) for at in slotted]

    def same(self) -> bool:
        """All are there, and have what they had."""
        values = [find() for find in self._find]
        modules = values[: self._modules]
        return (
            all(map(is_, map(type, values), self._kinds))
            and self._attributes.same(_attributes(values))
            and self._children.same([one._modules for one in modules])
            and _tensors_of(modules) == self._tensors
            and all(there.same([dict(attributes_of(values[at]))]) for at, there in self._slots)
        )


def _tensors_of(modules: Iterable[nn.Module]) -> list[tuple[int, Key]]:
    """(which of ``modules``, what its parameters and buffers are) of those that have some."""
    return [(at, tensors_key(one)) for at, one in enumerate(modules) if one._parameters or one._buffers]


def _attributes(values: Iterable[Any]) -> list[dict[str, Any]]:
    return [getattr(value, "__dict__", _NOTHING) for value in values]


@dataclass(frozen=True, slots=True)
class _There:
    """What was where: containers with what they held, those that held nothing, objects, and arrays with elements."""

    empty: Sequence[Any]
    tables: tuple[Sequence[Mapping[Any, Any]], _Tables]
    rows: Sequence[tuple[Any, _Content]]
    objects: _Objects
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
                and self.tables[1].same(self.tables[0])
                and all(values.same(row) for row, values in self.rows)
                and self.objects.same()
                and all(map(_same_array, self.arrays))
            )
        except Exception:  # as above
            return False


#: Tables of a module that hold what takes memory.
_OWN_TABLES = ("_parameters", "_buffers", "_modules")


def _collected(block: nn.Module, seen: Seen) -> _There:
    others: list[Any] = []
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
            others.append(value)
    full = [one for one in held if len(one)]
    tables = [one for one in full if type(one) in _TABLES]
    return _There(
        empty=[one for one in held if not len(one)],
        tables=(tables, _Tables(tables)),
        rows=[(one, _Content(one)) for one in full if type(one) in _ROWS],
        objects=_Objects([*block.modules()], others),
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


def _same_array(there: tuple[Callable[[], Any], tuple[int, ...], str, bytes]) -> bool:
    found, shape, kind, content = there
    array = found()
    return array is not None and (array.shape, array.dtype.str, array.tobytes()) == (shape, kind, content)
