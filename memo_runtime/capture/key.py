"""When a capture holds: everything that a trace has frozen.

A trace depends on the Python state of the block and on what kinds of arguments it is called with. Both are summed up in
one key at each call; another key captures again. Not seen here: globals, closures and attributes of classes
(``outside.py`` has them), elements of large arrays, and what lies more than ``_DEPTH`` objects deep.
"""

from __future__ import annotations

import inspect
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.ambient import AutocastState
from memo_runtime.blocks.cache import is_cache
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.containers import text_of
from memo_runtime.blocks.operators import registered_mixers
from memo_runtime.blocks.places import PLAIN, is_small_array
from memo_runtime.capture.copying import HOOK_TABLES
from memo_runtime.capture.dims import USUAL, Reading, token_dims
from memo_runtime.capture.recorders import recorded_now

Key = tuple[Any, ...]
#: By address, an object, how deep it was looked into, and what was found. It holds what it knows: the address of an
#: object that has gone is another's.
Seen = dict[int, tuple[Any, int, Any]]


class Itself:
    """An object by its identity, equal to that object alone: its address is another's once it has gone."""

    __slots__ = ("_address", "_found")

    def __init__(self, value: Any) -> None:
        self._address = id(value)
        self._found: Callable[[], Any]
        try:
            self._found = weakref.ref(value)
        except TypeError:
            self._found = lambda: value

    def __hash__(self) -> int:
        return self._address

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Itself) or self._address != other._address:
            return False
        found = self._found()
        return found is not None and found is other._found()

    def __repr__(self) -> str:
        return f"<{self._address:#x}>"


_GLOBAL_TABLES = tuple(f"_global{table}" for table in HOOK_TABLES)
_SKIPPED = ("_parameters", "_buffers", "_modules", "__getstate__", "forward")
_DEPTH = 4


def capture_key(block: nn.Module, call: BlockCall, reading: Reading = USUAL, state: Key | None = None) -> Key:
    """The key of ``call`` of ``block``; hashable, equal where one capture under ``reading`` serves both.

    ``state``: the block's ``state_key``, where somebody has it already.

    Raises:
        CaptureRefusedError: the call has no input with tokens.
    """
    _, dims = token_dims(call, reading)
    leaves = tuple(_leaf(leaf, dims.get(index, ())) for index, leaf in enumerate(call.leaves))
    device = call.leaves[next(iter(dims))].device
    precision = AutocastState.current(device.type).signature()
    ambient = (reading, precision, torch.get_default_dtype(), bool(hooks_of_all_modules()), recorded_now())
    return (text_of(call.spec), leaves, registered_mixers(), ambient, state_key(block) if state is None else state)


def hooks_of_all_modules() -> list[Any]:
    """Hooks that somebody has registered for every module of the process; those of PyTorch itself only look."""
    tables = [getattr(nn.modules.module, name) for name in _GLOBAL_TABLES]
    if not any(tables):
        return []
    hooks = (hook for table in tables for hook in table.values())
    return [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("torch.")]


def _leaf(leaf: Any, dims: tuple[int, ...]) -> Any:
    if isinstance(leaf, torch.Tensor):
        shape = tuple(None if dim in dims else size for dim, size in enumerate(leaf.shape))
        return (shape, _order_of(leaf.stride()), leaf.dtype, leaf.device, leaf.requires_grad)
    if is_cache(leaf):
        return type(leaf)
    return value_key(leaf)


@lru_cache(maxsize=1 << 12)
def _order_of(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Dimensions, the outermost in memory first."""
    return tuple(sorted(range(len(strides)), key=lambda dim: (-int(strides[dim]), dim)))


def value_key(value: Any) -> Any:
    """``value``, which is no tensor, as something hashable that changes when it does."""
    return _value(value, {}, _DEPTH)


def state_key(block: nn.Module, seen: Seen | None = None) -> Key:
    """Python state of ``block`` and of all modules inside: attributes, modes, hooks, and what its tensors are.

    ``seen``: an empty one, for whoever wants to know what was looked into.
    """
    seen = {} if seen is None else seen
    found: list[Any] = []
    for name, module in block.named_modules():
        attributes = tuple(
            (key, _value(value, seen, _DEPTH)) for key, value in module.__dict__.items() if key not in _SKIPPED
        )
        found.append((name, type(module), "forward" in module.__dict__, attributes, tensors_key(module)))
    return tuple(found)


def tensors_key(module: nn.Module) -> Key:
    """What the parameters and buffers of ``module`` itself are."""
    return tuple(
        [
            (key, tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)
            for table in (module._parameters, module._buffers)
            for key, tensor in table.items()
            if tensor is not None
        ]
    )


def kinds_inside(block: nn.Module, call: BlockCall) -> set[type]:
    """Classes of the objects that ``block`` and ``call`` hold; modules aside."""
    seen: Seen = {}
    for module in block.modules():
        for name, value in module.__dict__.items():
            if name not in _SKIPPED:
                _value(value, seen, _DEPTH)
    for leaf in call.leaves:
        _value(leaf, seen, _DEPTH)
    return {type(value) for value, _, _ in seen.values() if not is_opaque(value)}


def difference(before: Key, after: Key, call: BlockCall) -> str:
    """Words for what makes the key ``after``, that of ``call``, another than ``before``, of the same block."""
    old, new = before[1], after[1]
    at = next((at for at, (one, other) in enumerate(zip(old, new, strict=False)) if one != other), None)
    if at is not None:
        return f"argument {at} ({type(call.leaves[at]).__name__})"
    if before[-1] != after[-1]:
        return changed(before[-1], after[-1])
    return "the arguments' structure" if before[0] != after[0] else "autocast, or what is registered,"


def changed(before: Key, after: Key) -> str:
    """Words for an attribute in which two states of one module differ."""
    for (name, _, _, old, _), (_, _, _, new, _) in zip(before, after, strict=False):
        known = dict(old)
        found = [key for key, value in new if key not in known or known[key] != value]
        if found:
            return f"attribute '{f'{name}.' if name else ''}{found[0]}'"
    return "an attribute"


def _value(value: Any, seen: Seen, depth: int) -> Any:
    """``value`` as something hashable that changes when it does."""
    if isinstance(value, PLAIN):
        return (type(value), value)
    known = seen.get(id(value))
    if known is not None and known[1] >= depth:
        return known[2]
    seen[id(value)] = (value, depth, ("seen", len(seen)))  # for cycles
    found: Any = Itself(value)
    if isinstance(value, Mapping) and depth:
        found = tuple((_value(k, seen, 0), _value(v, seen, depth)) for k, v in value.items())
    elif isinstance(value, (list, tuple, set, frozenset, deque)) and depth:
        items = [_value(item, seen, depth) for item in value]
        found = tuple(sorted(items, key=str) if isinstance(value, (set, frozenset)) else items)
    elif is_small_array(value):
        found = (Itself(value), value.shape, value.dtype.str, value.tobytes())
    elif depth and not is_opaque(value):
        inner = ((key, one) for key, one in attributes_of(value) if not isinstance(one, torch.Tensor))
        found = (type(value), Itself(value), *((key, _value(one, seen, depth - 1)) for key, one in inner))
    seen[id(value)] = (value, depth, found)
    return found


def attributes_of(value: Any) -> list[tuple[str, Any]]:
    """Those of an object, with their names, with and without a dictionary of its own."""
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if name[:2] != "__"]
    found = [(name, getattr(value, name)) for name in slots if hasattr(value, name)]
    return [*found, *getattr(value, "__dict__", {}).items()]


def is_opaque(value: Any) -> bool:
    """Told apart by identity alone."""
    return isinstance(value, (nn.Module, torch.Tensor, type)) or inspect.isroutine(value)
