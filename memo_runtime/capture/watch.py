"""The state key of a block, read anew only when something that it reads is another object.

A key takes a millisecond: there are 1,400 values in a block of a Llama, and sixteen such blocks take some 190 on a GPU
for 8,192 tokens. To see that the same objects are in the same places takes a twelfth of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.places import is_small_array
from memo_runtime.capture.key import Key, Seen, attributes_of, is_opaque, state_key, tensors_key


class StateWatch:
    """``state_key`` of ``block``, at every call of ``key``.

    Between two calls it holds the objects that the state had at the last one, but no tensor.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._key: Key = ()
        self._there: _There | None = None

    def key(self) -> Key:
        """The key of the state as it is now."""
        if self._there is None or not self._there.unchanged():
            self._there = None
            seen: Seen = {}
            self._key = state_key(self._block, seen)
            self._there = _There.of(self._block, seen)
        return self._key


@dataclass(frozen=True, slots=True)
class _There:
    """What was where: ``tables`` (dictionaries) and ``rows`` (lists, sets, deques) with what they held, and those that
    held nothing (``empty``); objects with ``slots``; arrays; and of each module what its tensors were.
    """

    objects: Sequence[Any]
    kinds: Sequence[type]
    empty: Sequence[Any]
    tables: Sequence[tuple[Mapping[Any, Any], list[Any], list[Any]]]
    rows: Sequence[tuple[Any, list[Any]]]
    slots: Sequence[tuple[Any, list[tuple[str, Any]]]]
    arrays: Sequence[tuple[Any, tuple[int, ...], str, bytes]]
    modules: Sequence[tuple[nn.Module, Key]]

    @classmethod
    def of(cls, block: nn.Module, seen: Seen) -> _There | None:
        """What is in ``block`` and in all that its key has ``seen``; None where that holds tensors."""
        modules = [*block.modules()]
        objects: list[Any] = [*modules]
        held: list[Any] = [table for module in modules for table in (module.__dict__, module._modules)]
        slots: list[tuple[Any, list[tuple[str, Any]]]] = []
        arrays = []
        for value, depth, _ in seen.values():
            if is_small_array(value):
                arrays.append((value, value.shape, value.dtype.str, value.tobytes()))
            elif not depth or isinstance(value, (tuple, frozenset)) or is_opaque(value):
                continue  # told apart by identity, which whoever holds it has
            elif isinstance(value, (Mapping, *_ROWS)):
                held.append(value)
            else:
                objects.append(value)
                held.append(getattr(value, "__dict__", {}))
                if any(getattr(kind, "__slots__", ()) for kind in type(value).__mro__):
                    slots.append((value, attributes_of(value)))
        full = [one for one in held if len(one)]
        tables = [(one, [*one], [*one.values()]) for one in full if isinstance(one, Mapping)]
        rows = [(one, [*one]) for one in full if not isinstance(one, Mapping)]
        contents = [*(values for _, _, values in tables), *(values for _, values in rows)]
        contents += [[value for _, value in named] for _, named in slots]
        if any(isinstance(one, torch.Tensor) for values in contents for one in values):
            return None
        return cls(
            objects=objects,
            kinds=[*map(type, objects)],
            empty=[one for one in held if not len(one)],
            tables=tables,
            rows=rows,
            slots=slots,
            arrays=arrays,
            modules=[(module, tensors_key(module)) for module in modules],
        )

    def unchanged(self) -> bool:
        """Everything is where it was."""
        return (
            all(map(is_, map(type, self.objects), self.kinds))
            and not any(map(len, self.empty))
            and all(_same(table, keys) and _same(table.values(), values) for table, keys, values in self.tables)
            and all(_same(row, values) for row, values in self.rows)
            and all(_same_named(attributes_of(value), before) for value, before in self.slots)
            and all(_same_array(*array) for array in self.arrays)
            and all(tensors_key(module) == before for module, before in self.modules)
        )


#: Containers beside mappings that can be changed in place.
_ROWS = (list, set, deque)


def _same(now: Any, before: Sequence[Any]) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))


def _same_named(now: Sequence[tuple[str, Any]], before: Iterable[tuple[str, Any]]) -> bool:
    pairs = [*before]
    return len(now) == len(pairs) and all(a == b and x is y for (a, x), (b, y) in zip(now, pairs, strict=True))


def _same_array(array: Any, shape: tuple[int, ...], kind: str, content: bytes) -> bool:
    return bool(array.shape == shape and array.dtype.str == kind and array.tobytes() == content)
