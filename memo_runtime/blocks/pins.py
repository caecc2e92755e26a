"""Pins: operator results that a rerun takes from the forward instead of computing them.

Attention mixes tokens, dropout draws random numbers, routing must not flip, a position counter starts at zero: run
on a token slice they would give something else. They are replaced below autograd, by a dispatch mode, so that the
graph of the rerun has the nodes of the forward and saves the same tensors in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch

from memo_runtime.blocks.aside import is_aside
from memo_runtime.blocks.dispatch import OutsideCompiled
from memo_runtime.blocks.operators import base_name, full_name, is_mutable, operator_flops, pin_kind, written_by
from memo_runtime.blocks.region import copied_as_it_is
from memo_runtime.blocks.rerun import storage_key
from memo_runtime.records import Pin, PinKind

PinKey = tuple[str, int]
Value = torch.Tensor | int | float | bool | None
Values = Mapping[int, Value]


def by_call(pins: Iterable[Pin]) -> dict[PinKey, list[Pin]]:
    """Pins grouped by the operator call that they belong to."""
    grouped: dict[PinKey, list[Pin]] = {}
    for pin in pins:
        grouped.setdefault((pin.op, pin.call), []).append(pin)
    return grouped


def outputs_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> tuple[Any, ...]:
    """What a pin holds of a call: the arguments that it wrote to, then the results that are none of these."""
    results = tuple(out) if isinstance(out, (tuple, list)) else (out,)
    if not is_mutable(func):
        return results
    fresh = (result for result, known in zip(results, func._schema.returns, strict=False) if known.alias_info is None)
    return (*written_by(func, args, kwargs), *fresh)


def written_storages(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[int]:
    """Storages that a mutable operator writes to."""
    for target in written_by(func, args, kwargs):
        for one in target if isinstance(target, (list, tuple)) else (target,):
            if isinstance(one, torch.Tensor):
                yield storage_key(one)


def packed_value(name: str, value: torch.Tensor) -> torch.Tensor:
    """A pin's value as it is stored.

    A Bernoulli draw of zeros and ones needs one byte an element. Random numbers and routing weights are copied, since
    forwards scale them in place; the mask of a fused dropout is not, autograd saves that very tensor.
    """
    base = base_name(name)
    if base.startswith("bernoulli") and value.dtype != torch.bool:
        return value.to(torch.bool)
    if base == "native_dropout":
        return value
    written = base.endswith("_") or name.endswith("out")
    copied = written or pin_kind(name) in (PinKind.RANDOM, PinKind.ROUTING)
    return value.clone() if copied else value


def pin_values(name: str, outputs: tuple[Any, ...], wanted: tuple[int, ...] | None = None) -> dict[int, Value]:
    """The outputs that a pin of operator ``name`` holds, packed; ``wanted`` None: all that are needed."""
    if wanted is None:
        wanted = (1,) if base_name(name) == "native_dropout" else tuple(range(len(outputs)))
    chosen = {index: outputs[index] for index in wanted}
    return {
        index: packed_value(name, value.detach()) if isinstance(value, torch.Tensor) else value
        for index, value in chosen.items()
    }


class CountingMode(OutsideCompiled):
    """A dispatch mode that numbers the calls of each operator and leaves compiled regions compiled."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: Counter[str] = Counter()

    def next_key(self, func: Any) -> PinKey:
        """(operator, how many calls of it came before)."""
        name = full_name(func)
        call = self._calls[name]
        self._calls[name] += 1
        return name, call

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator; subclasses see it through ``handle``."""
        if is_aside():
            return func(*args, **(kwargs or {}))
        return self.handle(func, self.next_key(func), args, kwargs or {})

    def handle(self, func: Any, key: PinKey, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What to do with one operator call."""
        raise NotImplementedError


class CaptureMode(CountingMode):
    """Runs everything and remembers chosen outputs of chosen calls, in ``captured[(op, call)][output]``.

    A rerun goes on in place where its forward did (``y = scores @ v; y += x``), so what it is given is what the
    operator gave: before a result is written to, it is copied.

    Attributes:
        captured: what is remembered. written: calls of which a result was written to later; a rerun gets copies of it.
    """

    def __init__(self, wanted: Callable[[PinKey], tuple[int, ...] | None]) -> None:
        """``wanted`` maps an operator call to the outputs to keep; empty: none, ``None``: all that a pin holds."""
        super().__init__()
        self._wanted = wanted
        self.captured: dict[PinKey, dict[int, Value]] = {}
        self.written: set[PinKey] = set()
        self._shared: dict[int, list[tuple[PinKey, int]]] = {}

    def handle(self, func: Any, key: PinKey, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operator and keep what a pin needs of it."""
        if self._shared and is_mutable(func):
            for storage in written_storages(func, args, kwargs):
                self._part(storage)
        out = func(*args, **kwargs)
        wanted = self._wanted(key)
        if wanted is None or wanted:
            values = outputs_of(func, args, kwargs, out)
            self.captured[key] = pin_values(key[0], values, wanted)
            for output, value in self.captured[key].items():
                if isinstance(value, torch.Tensor):
                    self._shared.setdefault(storage_key(value), []).append((key, output))
        return out

    def _part(self, storage: int) -> None:
        """``storage`` is about to be written to: what was remembered of it gets its own."""
        for key, output in self._shared.pop(storage, ()):
            value = self.captured[key][output]
            assert isinstance(value, torch.Tensor), "only tensors have a storage"
            self.captured[key][output] = copied_as_it_is(value)
            self.written.add(key)


class ReplayMode(CountingMode):
    """Returns given values for chosen calls and runs the rest, counting its FLOPs."""

    def __init__(self, values: Mapping[PinKey, Values], *, written: Collection[PinKey]) -> None:
        """``written``: calls whose results are written to later, which get a copy."""
        super().__init__()
        self._values = values
        self._written = written
        self._given: dict[int, str] = {}
        self.flops = 0
        self.replaced: set[PinKey] = set()

    def replaces(self, key: PinKey) -> bool:
        """Whether this call has a given value."""
        return key in self._values

    def handle(self, func: Any, key: PinKey, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Substitute the operator's result, or run it.

        Raises:
            RuntimeError: it would write to a value that lies in the memory of what backward needs.
        """
        if self._given and is_mutable(func):
            self._check_written(func, key[0], args, kwargs)
        values = self._values.get(key)
        if values is None:
            out = func(*args, **kwargs)
            self.flops += operator_flops(func, args, kwargs, out)
            return out
        self.replaced.add(key)
        if is_mutable(func):
            return _written(func, args, kwargs, values)
        copied = key in self._written
        if not copied:
            self._given.update((storage_key(one), key[0]) for one in values.values() if isinstance(one, torch.Tensor))
        return _substitute(func, key[0], args, values, copied=copied)

    def _check_written(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((self._given[one] for one in written_storages(func, args, kwargs) if one in self._given), None)
        if given is not None:
            raise RuntimeError(f"{name} writes to what {given} gave, in whose place is what backward needs of it")


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], values: Values) -> Any:
    """Write what an operator wrote, and give what it gave; ``values`` are as ``outputs_of`` has them."""
    schema = func._schema
    targets = [argument for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    written = written_by(func, args, kwargs)
    for index, (target, argument) in enumerate(zip(written, targets, strict=True)):
        value = values.get(index)
        if isinstance(target, torch.Tensor) and isinstance(value, torch.Tensor):
            if argument.is_out and target.shape != value.shape:
                target.resize_(value.shape)  # as the operator does
            target.copy_(value)
    aliases = {frozenset(argument.alias_info.before_set): one for argument, one in zip(targets, written, strict=True)}
    fresh = iter(range(len(written), len(written) + len(schema.returns)))
    results = [
        _as_result(values.get(next(fresh)), copied=True)
        if known.alias_info is None
        else aliases[frozenset(known.alias_info.before_set)]
        for known in schema.returns
    ]
    return results[0] if len(results) == 1 else tuple(results) or None


def _substitute(func: Any, name: str, args: tuple[Any, ...], values: Values, *, copied: bool) -> Any:
    if base_name(name) == "native_dropout":
        # The mask is saved, the product is not: it costs one pass over a tensor that is there anyway.
        mask = values[1]
        assert isinstance(mask, torch.Tensor), "dropout saves its mask"
        mask = copied_as_it_is(mask) if copied else mask
        scale = 0.0 if args[1] == 1 else 1.0 / (1.0 - args[1])
        return torch.ops.aten.native_dropout_backward(args[0], mask, scale), mask
    schema = getattr(func, "_schema", None)
    count = len(schema.returns) if schema is not None else max(values) + 1
    copied = copied or pin_kind(name) in (PinKind.RANDOM, PinKind.ROUTING)
    outputs = tuple(_as_result(values.get(index), copied=copied) for index in range(count))
    return outputs[0] if count == 1 and schema is not None else outputs


def _as_result(value: Value, *, copied: bool) -> Value:
    """A tensor that autograd may treat as an operator's own result: no view of another one."""
    if not isinstance(value, torch.Tensor):
        return value
    if copied:
        value = copied_as_it_is(value)
    return value.new_empty(0).set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())
