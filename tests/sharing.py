"""Work that tests share: a block that was profiled or captured before in the same state is so no second time.

Most tests try one tiny model in many ways, and nearly all their time went into finding out the same about its blocks.
What a block's profile and capture are made from is told in full: its code, all that it can reach and its arguments, the
modes in force; by value for a profile, by shape for a capture. The first of a kind is made as ever, and whatever tells
the same gets that one. What cannot be told is not shared, and neither is anything in a test marked ``anew``, which
looks at how profiles and captures are made, or changes what they are made by.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn

from memo_runtime.blocks.ambient import AutocastState
from memo_runtime.blocks.declared import declared_in
from memo_runtime.blocks.operators import registered_mixers
from memo_runtime.blocks.reach import _is_engine, _may_hold_state, reach
from memo_runtime.capture.key import hooks_of_all_modules
from memo_runtime.execution import tiled, tiled_cache, tiled_profile
from memo_runtime.offline import kinds as looking
from memo_runtime.offline import profile as studying
from memo_runtime.profiling import model as profiling
from memo_runtime.profiling import timing
from memo_runtime.profiling.likeness import Example
from memo_runtime.profiling.walk import NamedBlock, roots_of
from memo_runtime.records import BlockProfile

_ATOMS = (
    bool, int, float, complex, str, bytes, type(None), range, slice, Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip
#: Attributes of classes that belong to PyTorch's modules, and no code of a block.
_OF_EVERY_MODULE = frozenset(vars(nn.Module))
#: Modules of what the runtime puts on a block.
_INSTALLED = ("memo_runtime.execution.block", "memo_runtime.execution.install")


class NotToldError(Exception):
    """A value that nothing is known of but its identity."""


class Teller:
    """Tells values such that equal ones tell the same, and objects by the order in which they are met."""

    def __init__(self, *, values: bool) -> None:
        self._values = values
        self._numbers: dict[int, int] = {}
        self._held: list[Any] = []  # an address is one object's as long as that is there
        self._hash = hashlib.blake2b()

    def digest(self) -> bytes:
        """All that was told."""
        return self._hash.digest()

    def tell(self, *values: Any) -> None:
        """Add ``values``."""
        for value in values:
            self._hash.update(self._told(value).encode())

    def tell_state(self, roots: Iterable[tuple[str, Any]]) -> None:
        """Add all that can be reached from ``roots``."""
        roots = list(roots)
        self.tell([root for _, root in roots])
        found = reach(roots)
        for generator in found.generators:
            self.tell(generator)
        for cell, content in zip(found.cells, found.contents, strict=True):
            self.tell(type(cell), self._number(cell.holder))
            if type(cell).__name__ == "HooksCell":  # by numbers that no two modules have in common
                self.tell([[(self._numbered(key), hook) for key, hook in table] for table in content])
            elif type(cell).__name__ == "ArrayCell":
                self._hash.update(content.tobytes())
            elif isinstance(content, dict):  # the block's own forward is told apart from what is installed over it
                self.tell({key: one for key, one in content.items() if type(one).__module__ not in _INSTALLED})
            else:
                self.tell(content)

    def _told(self, value: Any) -> str:
        if isinstance(value, _ATOMS):
            return f"{type(value).__name__} {value!r};"
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, (dict, list, tuple, set, frozenset)):
            return self._container(value)
        if isinstance(value, type):
            return _itself(value)
        if inspect.isroutine(value) or isinstance(value, partial):
            return self._function(value)
        if isinstance(value, torch.Generator):
            return str(value.get_state().tolist())
        if isinstance(value, nn.Module) and not _is_engine(type(value)):  # whose attributes are no cells
            return f"{_itself(type(value))}{self._number(value)}{self._class(type(value))}"
        if not isinstance(value, nn.Module) and _may_hold_state(type(value)):  # what it holds is a cell
            return f"{_itself(type(value))}{self._number(value)}"
        raise NotToldError(type(value))

    def _container(self, value: Any) -> str:
        if isinstance(value, dict):
            items = [f"{self._told(key)}={self._told(one)}" for key, one in value.items() if key != "__weakref__"]
        else:
            items = [self._told(one) for one in value]
            items = sorted(items) if isinstance(value, (set, frozenset)) else items
        return f"{_itself(type(value))}[{' '.join(items)}]"

    def _tensor(self, tensor: torch.Tensor) -> str:
        without_values = tensor.device.type == "meta" and not self._values
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer) or not (tensor.is_cpu or without_values):
            raise NotToldError(type(tensor))
        if tensor.layout is not torch.strided:
            raise NotToldError(type(tensor))
        if self._values and tensor.numel() and id(tensor) not in self._numbers:
            packed = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
            self._hash.update(packed.view(torch.uint8).numpy().tobytes())
        looks = (type(tensor).__name__, tuple(tensor.shape), tensor.stride(), str(tensor.dtype), tensor.requires_grad,
                 tensor.is_leaf, tensor._is_view(), tensor.storage_offset(), tensor.is_meta)  # fmt: skip
        return f"{looks}{self._number(tensor)}{self._number(tensor.untyped_storage())}"

    def _function(self, value: Any) -> str:
        if isinstance(value, partial):
            return f"partial[{self._told((value.func, value.args, value.keywords))}]"
        owner = getattr(value, "__self__", None)
        inner = getattr(value, "__func__", value)
        code = getattr(inner, "__code__", None)
        if code is None:
            if owner is not None and not inspect.ismodule(owner):
                raise NotToldError(type(value))
            return _itself(value)
        if id(inner) in self._numbers:  # it may be in its own closure
            return f"{self._number(inner)}{self._told(owner)}"
        closed = [cell.cell_contents for cell in inner.__closure__ or ()]
        return f"{self._number(inner)}{_itself(code)}{self._told((inner.__defaults__, owner, closed))}"

    def _class(self, kind: type) -> str:
        """Its code, which a test may have exchanged."""
        functions = (
            vars(base)[name] for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module
            for name in vars(base) if name not in _OF_EVERY_MODULE or name == "forward"
        )  # fmt: skip
        return " ".join(str(id(one.__code__)) for one in functions if inspect.isfunction(one) and _itself(one.__code__))

    def _numbered(self, key: int) -> int:
        """The number of a hook, which is the same in all tables of a module."""
        return self._numbers.setdefault(-1 - key, len(self._numbers))

    def _number(self, value: Any) -> str:
        address = value._cdata if isinstance(value, torch.UntypedStorage) else id(value)
        if address not in self._numbers:
            self._held.append(value)
        return f"#{self._numbers.setdefault(address, len(self._numbers))}"


@cache
def _itself(value: Any) -> str:
    """A class, function or code by its identity; it is kept, so that no other gets its address."""
    return f"{getattr(value, '__qualname__', value)}@{id(value)}"


def _key_of(roots: Iterable[tuple[str, Any]], *others: Any, values: bool) -> bytes | None:
    """Everything that work on ``roots`` depends on; None: it cannot be told, or is no work to be shared."""
    if hooks_of_all_modules() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return None
    teller = Teller(values=values)
    flags = (
        AutocastState.current("cpu").signature(), torch.is_autocast_cache_enabled(), torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
        str(torch.get_default_dtype()), torch.backends.cuda.math_sdp_enabled(), torch.backends.mkldnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(), registered_mixers(), timing._MOST_SAMPLES,
    )  # fmt: skip
    try:
        teller.tell(flags, *others)
        teller.tell_state(roots)
    except (NotToldError, RecursionError):
        return None
    return teller.digest()


class _Known(dict[Any, Any]):
    """What was made, by what it was made from."""

    def or_made(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is known under ``key``; made now if nothing is, or if there is no key."""
        if key is None:
            return make()
        if key not in self:
            self[key] = make()
        return self[key]


_calibrations, _times, _captures, _programs = _Known(), _Known(), _Known(), _Known()
_kinds, _tiles = _Known(), _Known()


def _calibrate(
    block: nn.Module, forward: Any, call: Any, start: Any, *, name: str, stack: int, examples: list[Example]
) -> BlockProfile:
    roots = roots_of(NamedBlock(name, stack, block, forward), call)
    key = _key_of(roots, forward, call.leaves, str(call.spec), name, stack, values=True)

    def make() -> tuple[BlockProfile, list[Example], bool]:
        before = len(examples)
        made = _CALIBRATE(block, forward, call, start, name=name, stack=stack, examples=examples)
        added = examples[before:]
        del examples[before:]
        return made, added, start.left

    profile, added, left = _calibrations.or_made(key, make)
    if profile.draws:  # from generators of the whole process
        _calibrations.pop(key, None)
    examples += added
    start.wrote, start.drew = start.wrote or profile.stateful, start.drew or profile.draws
    start.left = start.left or left
    return profile  # type: ignore[no-any-return]


def _time_block(
    block: nn.Module, forward: Any, call: Any, profile: BlockProfile, *, start: Any, device: torch.device
) -> BlockProfile:
    roots = roots_of(NamedBlock(profile.name, profile.stack, block, forward), call)
    key = _key_of(roots, forward, call.leaves, str(call.spec), repr(profile), values=True)
    key = None if profile.draws else key
    made = _times.or_made(key, lambda: _TIME_BLOCK(block, forward, call, profile, start=start, device=device))
    return made  # type: ignore[no-any-return]


def _capture(block: nn.Module, call: Any, forward: Any = None) -> Any:
    key = None
    if not declared_in(block):
        arguments = call.original if call.original is not None else call.leaves
        key = _key_of([("", block), ("", arguments)], forward, call.leaves, str(call.spec), values=False)
    if key in _captures and not _captures[key].holds(call):
        del _captures[key]  # a global that it reads is another now
    return _captures.or_made(key, lambda: _CAPTURE(block, call, forward))


def _make_programs(
    captured: Any, stage: int, sources: Any, tokens: int, autocast: Any, *, compiler: Any, fused: bool = False
) -> Any:
    layout = tuple((tuple(one.shape), one.stride(), one.dtype, one.device) for one in sources)
    key = None
    if not captured.traced.declared.live:
        key = (captured.signature, stage, tokens, autocast, layout, compiler, fused)
    return _programs.or_made(
        key, lambda: _MAKE_PROGRAMS(captured, stage, sources, tokens, autocast, compiler=compiler, fused=fused)
    )


def _look(ref: Any, call: Any) -> Any:
    key = _key_of([("", ref.module), ("", call.leaves)], ref.name, ref.stack, str(call.spec), values=False)
    return _kinds.or_made(key, lambda: _LOOK(ref, call))


def _tiles_of(ref: Any, call: Any, machine: Any) -> Any:
    key = _key_of([("", ref.module), ("", call.leaves)], ref.name, str(call.spec), repr(machine), values=False)
    return _tiles.or_made(key, lambda: _TILES_OF(ref, call, machine))


_LOOK, _TILES_OF = looking._look, studying.tiles_of
_CALIBRATE, _TIME_BLOCK = profiling.calibrate, profiling.time_block
_CAPTURE, _MAKE_PROGRAMS = tiled.capture, tiled_cache.make_programs


@pytest.fixture(autouse=True)
def shared_work(request: pytest.FixtureRequest) -> Iterator[None]:
    """Profiles and captures of tiny blocks are made once."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("anew") is None:
            patch.setattr(profiling, "calibrate", _calibrate)
            patch.setattr(profiling, "time_block", _time_block)
            patch.setattr(tiled, "capture", _capture)
            for module in (tiled_cache, tiled_profile):
                patch.setattr(module, "make_programs", _make_programs)
            patch.setattr(looking, "_look", _look)
            patch.setattr(studying, "tiles_of", _tiles_of)
        yield
