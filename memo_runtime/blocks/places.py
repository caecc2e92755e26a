"""Places beside a block that its forward reads: names in a dictionary, members of a container, cells of closures.

Each knows what it held, says whether it holds something else now, and can put back what it held. Numbers and strings
are compared by value, other objects by identity. Once it is to be kept (``renew``) it holds tensors no more, and they
stand for each other.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from enum import Enum
from itertools import chain
from operator import is_
from types import CellType
from typing import Any, Protocol

import torch

from memo_runtime.blocks.ambient import BufferState

#: Told apart by value.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)
#: Containers whose members are looked at, up to so many.
CONTAINERS = (dict, list, set, deque)
#: Their own methods put back what one held: a class derived from one may count, refuse or pass on what it is given.
_BASES: tuple[Any, ...] = (OrderedDict, *CONTAINERS)
MOST_MEMBERS = 256
_MOST_ELEMENTS = 1 << 16

#: A trace has refused a tensor that it could have frozen, and others (what a step leaves somewhere) must not be held.
_TENSOR = object()
_ABSENT = object()


def _held(value: Any) -> Any:
    return _TENSOR if isinstance(value, torch.Tensor) else value


def _alike(now: Any, before: Any) -> bool:
    if now is before:
        return True
    return type(now) is type(before) and isinstance(before, PLAIN) and bool(now == before)


def _difference(now: Collection[Any], before: Collection[Any]) -> int | None:
    """Where the first is, of as many; None: there is none."""
    if all(map(is_, now, before)):
        return None
    pairs = enumerate(zip(now, before, strict=True))
    return next((at for at, (one, other) in pairs if one is not other and not _alike(_held(one), other)), None)


#: Where classes come from whose objects go on doing something: one that a run has started cannot be taken back.
_RUNNING = ("threading", "io", "_io", "socket", "subprocess", "multiprocessing.process", "concurrent.futures._base")


def _runs_on(value: Any) -> bool:
    return any(base.__module__ in _RUNNING for base in type(value).__mro__)


def is_small_array(value: Any) -> bool:
    """A NumPy array whose elements can be looked at, at every call."""
    numpy = sys.modules.get("numpy")
    array = numpy is not None and isinstance(value, numpy.ndarray)
    return array and value.size <= _MOST_ELEMENTS and not value.dtype.hasobject


class Place(Protocol):
    """See the module."""

    holder: Any

    def now(self) -> list[Any]:
        """What is there."""

    def renew(self) -> None:
        """Take what is there now for what it held, and hold no tensor."""

    def changed(self) -> str:
        """Words for the first thing that is another now; empty if nothing is."""

    def put_back(self) -> None:
        """Make it hold again what it held; tensors cannot be."""


class Names:
    """Some names of ``holder``, a dictionary or a proxy of that of ``owner``; ``label`` has a place for a name."""

    def __init__(self, label: str, holder: Any, owner: type | None = None) -> None:
        self._label, self.holder, self._owner = label, holder, owner
        self._values: dict[Any, Any] = {}
        #: Names that it has, where others matter too.
        self._there: set[Any] | None = None

    def add_all(self) -> list[str]:
        """Watch all that it has, and that no other comes; yields their names."""
        found = self._names()
        if self._there is None:
            self._there = {*found}
        for name in found:
            self.add(name)
        return found

    def _names(self) -> list[str]:
        return [name for name in self.holder if isinstance(name, str) and name[:2] != "__"]

    def _new(self) -> list[str]:
        return [name for name in self._names() if name not in self._there] if self._there is not None else []

    def add(self, name: Any) -> Any:
        """Watch ``name`` too, and what it stands for; None where there is no such thing."""
        value = self.holder.get(name, _ABSENT)
        self._values.setdefault(name, value)
        return None if value is _ABSENT else value

    def now(self) -> list[Any]:
        """See ``Place``."""
        get = self.holder.get
        return [get(name, _ABSENT) for name in self._values]

    def renew(self) -> None:
        """See ``Place``."""
        if self._there is not None:
            self._there = None
            self.add_all()
        self._values = dict(zip(self._values, map(_held, self.now()), strict=True))

    def changed(self) -> str:
        """See ``Place``."""
        at = _difference(self.now(), self._values.values())
        name = next(iter(self._new()), None) if at is None else [*self._values][at]
        return "" if name is None else self._label.format(name)

    def put_back(self) -> None:
        """See ``Place``."""
        for name, value in [*self._values.items(), *((name, _ABSENT) for name in self._new())]:
            now = self.holder.get(name, _ABSENT)
            if value is _TENSOR or now is value or _alike(_held(now), value) or _runs_on(now):
                continue
            if self._owner is not None:
                delattr(self._owner, name) if value is _ABSENT else setattr(self._owner, name, value)
            elif value is _ABSENT:
                del self.holder[name]
            else:
                self.holder[name] = value


    def plainly(self) -> tuple[dict[Any, Any], bool]:
        """(what it holds by name, whether no other name may come)."""
        return self._values, self._there is not None


class Members:
    """All members of a dict, list, set or deque."""

    def __init__(self, label: str, holder: Any) -> None:
        self._label, self.holder = label, holder
        self._values = self.now()

    def now(self) -> list[Any]:
        """See ``Place``."""
        held = self.holder
        return [*held, *held.values()] if isinstance(held, dict) else [*held]

    def renew(self) -> None:
        """See ``Place``."""
        self._values = [*map(_held, self.now())]

    def changed(self) -> str:
        """See ``Place``."""
        held = self.holder
        size = 2 * len(held) if isinstance(held, dict) else len(held)
        same = size == len(self._values) and _difference(self.now(), self._values) is None
        return "" if same else self._label

    def put_back(self) -> None:
        """See ``Place``."""
        held, half = self.holder, len(self._values) // 2
        if not self.changed() or any(one is _TENSOR for one in self._values):
            return
        base = next(one for one in _BASES if isinstance(held, one))
        base.clear(held)
        if issubclass(base, dict):
            for key, value in zip(self._values[:half], self._values[half:], strict=True):
                base.__setitem__(held, key, value)
        else:
            (base.update if base is set else base.extend)(held, self._values)


class Elements:
    """The elements of a NumPy array."""

    def __init__(self, label: str, holder: Any) -> None:
        self._label, self.holder = label, holder
        self.renew()

    def now(self) -> list[Any]:
        """See ``Place``."""
        return [self.holder]

    def renew(self) -> None:
        """See ``Place``."""
        self._values = self.holder.copy()

    def changed(self) -> str:
        """See ``Place``."""
        return "" if self.holder.tobytes() == self._values.tobytes() else self._label

    def put_back(self) -> None:
        """See ``Place``."""
        self.holder[...] = self._values


def is_small_tensor(tensor: torch.Tensor, most_bytes: int) -> bool:
    """One whose elements can be kept in ``most_bytes``; no parameter, which no forward writes to."""
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_inference()
    return plain and not tensor.is_meta and tensor.nbytes <= most_bytes


class Values:
    """The elements of a tensor."""

    def __init__(self, label: str, holder: torch.Tensor) -> None:
        self._label, self.holder = label, holder
        self.renew()

    def now(self) -> list[Any]:
        """See ``Place``."""
        return [self.holder]

    def renew(self) -> None:
        """See ``Place``."""
        self._version, self._values = self.holder._version, BufferState.current([self.holder])

    def changed(self) -> str:
        """See ``Place``."""
        return "" if self.holder._version == self._version else self._label

    def put_back(self) -> None:
        """See ``Place``; on the CPU what was written past autograd too (``.data``, an array of the same memory).

        To see that on a device would wait for it, before every run of a profile.
        """
        if self.changed() or (self.holder.device.type == "cpu" and self._values.changed()):
            self._values.set()


class Glance:
    """Many places at one look, which most calls need and no more: whether each holds the very objects that it held.

    A block has some sixty, and to ask each of them takes longer than the look.
    """

    def __init__(self, places: Iterable[Place]) -> None:
        #: Those that hold a tensor, or members, or elements, are asked themselves.
        self._others: list[Place] = []
        self._found: list[tuple[Callable[[Any, Any], Any], Any]] = []
        self._values: list[Any] = []
        self._whole: list[Collection[Any]] = []
        self._cells: list[CellType] = []
        self._contents: list[Any] = []
        for place in places:
            if isinstance(place, Closed) and place.value is not _TENSOR:
                self._cells.append(place.holder)
                self._contents.append(place.value)
                continue
            values, alone = place.plainly() if isinstance(place, Names) else ({}, False)
            if not isinstance(place, Names) or any(one is _TENSOR for one in values.values()):
                self._others.append(place)
                continue
            self._found += [(place.holder.get, name) for name in values]
            self._values += values.values()
            self._whole += [place.holder] if alone else []
        self._sizes = [*map(len, self._whole)]
        self._names = [*chain.from_iterable(self._whole)]

    def same(self) -> bool:
        """False: something may be another."""
        try:
            contents = [cell.cell_contents for cell in self._cells]
        except ValueError:  # nothing is in one
            return False
        return (
            all(map(is_, contents, self._contents))
            and all(map(is_, [get(name, _ABSENT) for get, name in self._found], self._values))
            and [*map(len, self._whole)] == self._sizes
            and all(map(is_, chain.from_iterable(self._whole), self._names))
            and not any(one.changed() for one in self._others)
        )


class Closed:
    """A variable of a closure, which held ``value``."""

    def __init__(self, label: str, holder: CellType, value: Any) -> None:
        self._label, self.holder, self.value = label, holder, value

    def now(self) -> list[Any]:
        """See ``Place``."""
        try:
            return [self.holder.cell_contents]
        except ValueError:  # nothing is in it
            return [None]

    def renew(self) -> None:
        """See ``Place``."""
        self.value = _held(self.now()[0])

    def changed(self) -> str:
        """See ``Place``."""
        return "" if _difference(self.now(), [self.value]) is None else self._label

    def put_back(self) -> None:
        """See ``Place``."""
        if self.changed() and self.value is not _TENSOR:
            self.holder.cell_contents = self.value
