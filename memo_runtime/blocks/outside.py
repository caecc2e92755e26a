"""What a forward reads that neither its module nor its arguments hold: globals, attributes of classes, closures.

A trace freezes all of it, and runs that only look must change none. While the block runs once, each function that
starts is looked at: the names that its code spells lead from its globals and from the classes of the block to the
places (``places.py``) that it may read; of what code reaches that computes names (``spelled.py``) all are looked at.
They are read before the function runs, so that what it writes is seen too. Functions of PyTorch and of the standard
library are not looked into, but for layers of ``torch.nn``. Not seen: what lies more than ``_DEPTH`` objects deep,
large namespaces, containers and arrays, clocks.

Where all that is wanted is to undo it (``room``), longer containers are looked at, and tensors, by value.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import ChainMap, UserDict, UserList
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from itertools import islice
from operator import is_
from types import CellType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch._dynamo.decorators import skip
from torch._subclasses.fake_tensor import FakeTensor

from memo_runtime.blocks.places import (
    CONTAINERS,
    MOST_MEMBERS,
    PLAIN,
    Closed,
    Elements,
    Glance,
    Members,
    Names,
    Place,
    Values,
    is_small_array,
    is_small_tensor,
)
from memo_runtime.blocks.reach import is_generator, reach
from memo_runtime.blocks.spelled import ANY, spelled
from memo_runtime.blocks.state import LibraryRandom, shared_generators

_DEPTH = 4
#: So many places are looked at; beyond, nothing is followed any more.
_MOST_PLACES = 4096
#: Packages whose functions are not looked into, beside the standard library and torch, of which layers are.
_CLOSED = ("memo_runtime", "numpy", "sympy", "mpmath", "deepspeed")
_NAMESPACES = ("types.SimpleNamespace", "argparse.Namespace")
_LAYERS = ("torch.nn.modules.", "torch.nn.functional")
_MACHINERY = "torch.nn.modules.module"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
#: Members of a container that is looked at once, and not at every call.
_MOST_MEMBERS_ONCE = 1 << 16


@lru_cache(maxsize=4096)
@skip  # type: ignore[untyped-decorator]
def _is_closed(module: Any) -> bool:
    if not isinstance(module, str):
        return True
    package = module.partition(".")[0]
    if package == "torch":
        return module == _MACHINERY or not module.startswith(_LAYERS)
    return not package or package in _CLOSED or package in sys.stdlib_module_names


class Outside:
    """The places that one run of ``block`` leads to; ``kinds``: classes of the objects that it has.

    A context manager around the run. Ask ``written`` in the surroundings of the run and ``settle`` outside of them.

    Args:
        room: bytes for copies of tensors, of a run that is put back and never settled; None: it may be settled.
    """

    def __init__(self, block: nn.Module, kinds: Iterable[type] = (), *, room: int | None = None) -> None:
        self._most_members = MOST_MEMBERS if room is None else _MOST_MEMBERS_ONCE
        self._room = room or 0
        self._kinds = {one for one in (*map(type, block.modules()), *kinds) if not _is_closed(one.__module__)}
        found = [one for one in reach([("", block)]).generators if not isinstance(one, torch.Generator)]
        self._generators = {id(one): LibraryRandom.current([one]) for one in (*found, *shared_generators())}
        self._places: dict[int, Place] = {}
        #: What globals and classes have led to: what a run itself makes is not looked into.
        self._known: dict[int, Any] = {}
        self._seen: set[CodeType] = set()
        #: Functions that have variables of a closure: those that were met, and whether what these held was looked at.
        self._functions: dict[CodeType, dict[int, FunctionType]] = {}
        self._started_once: set[int] = set()
        self._modules = [*block.modules()]
        self._tracer: Any = None
        self._collects = self._runs = False
        #: Once they are settled.
        self._glance: Glance | None = None

    def changed(self) -> str:
        """Words for the first thing that is another than it was; empty if nothing is."""
        if self._glance is not None and self._glance.same():
            return ""
        return next((words for place in self._places.values() if (words := place.changed())), "")

    # ---- around the run

    def __enter__(self) -> Outside:
        for kind in self._kinds:
            self._see_class(kind, ("forward",), _DEPTH)
        for module in self._modules:
            for value in module.__dict__.values():
                for one in value if isinstance(value, (list, tuple)) else (value,):
                    self._meet(one)
            for table in _HOOKS:
                for hook in module.__dict__.get(table, {}).values():
                    self._meet_hook(hook)
        self._collects, self._tracer, self._runs = gc.isenabled(), sys.gettrace(), True
        self._watch()
        return self

    def __exit__(self, *_: object) -> None:
        self._rest()
        self._tracer, self._runs = None, False

    def _watch(self) -> None:
        # What libraries have called when garbage is collected (gc.callbacks) would be taken for functions of the block.
        gc.disable()
        sys.settrace(self._started)

    def _rest(self) -> None:
        sys.settrace(self._tracer)
        if self._collects:
            gc.enable()

    def paused(self) -> Pause:
        """In the middle of the run, around what is none of it."""
        return Pause(self)

    def written(self) -> str:
        """Words for what the run has changed; empty if nothing."""
        if any(one.advanced() for one in self._generators.values()):
            return "the state of a random generator of Python or NumPy"
        return self.changed()

    def holds_fakes(self) -> bool:
        """The run has left fake tensors somewhere."""
        changed = (place for place in self._places.values() if place.changed())
        return any(isinstance(one, FakeTensor) for place in changed for one in place.now())

    def put_back(self) -> None:
        """Undo what the run has changed."""
        for random in self._generators.values():
            if random.advanced():
                random.set()
        for place in self._places.values():
            place.put_back()

    def settle(self) -> Outside:
        """What is there now is what counts."""
        for place in self._places.values():
            place.renew()
        self._glance = Glance(self._places.values())
        self._known, self._seen, self._generators = {}, set(), {}
        self._functions, self._modules = {}, []
        return self

    @skip  # type: ignore[untyped-decorator]
    def _started(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and not _is_closed(frame.f_globals.get("__name__")):
            self._look_at(frame)

    # In the middle of what torch.compile runs, it would compile this, and what is called from here, as well.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _look_at(self, frame: FrameType) -> None:
        code = frame.f_code
        if code not in self._seen:
            self._seen.add(code)
            held, names = frame.f_globals, spelled(code)
            self._see_names(f"global '{{}}' of {held['__name__']}", held, names, _DEPTH)
            if "globals" in names:
                self._see_all(f"global '{{}}' of {held['__name__']}", held)
            for kind in self._kinds:
                self._see_class(kind, names, _DEPTH)
            if "environ" in code.co_names or "getenv" in code.co_names:
                self._see_environment(code.co_consts)
        if code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if id(first) in self._known:
                self._follow(f"an object of {type(first).__name__}", first, spelled(code), _DEPTH)
        if code.co_freevars and code in self._functions:
            self._see_closures(code, [frame.f_locals.get(name) for name in code.co_freevars])

    def _see_closures(self, code: CodeType, values: list[Any]) -> None:
        """Of the functions that were met, one of which starts: those whose variables hold ``values``.

        A decorator makes many with one code, and a frame does not say which of them it is of.
        """
        for function in [*self._functions[code].values()]:
            cells = function.__closure__ or ()
            if id(function) in self._started_once or not all(map(is_, map(_content, cells), values)):
                continue
            self._started_once.add(id(function))
            for name, cell, value in zip(code.co_freevars, cells, values, strict=True):
                label = f"'{name}' of the closure of {function.__qualname__}"
                if name != "__class__" and id(cell) not in self._places:
                    self._places[id(cell)] = Closed(label, cell, value)
                    self._follow(label, value, spelled(code), _DEPTH)

    def _meet_hook(self, hook: Any) -> None:
        """Take note of a hook, of what it is given beside its call, and of the object that it is a method of."""
        self._meet(hook)
        given: list[Any] = []
        while isinstance(hook, partial):
            given += [*hook.args, *hook.keywords.values()]
            hook = hook.func
        function = getattr(hook, "__func__", hook)
        owner = getattr(hook, "__self__", hook)
        if not isinstance(owner, (nn.Module, FunctionType, ModuleType)):
            self._known[id(owner)] = owner
        if isinstance(function, FunctionType) and not _is_closed(function.__module__):
            given += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            for one in given:
                self._follow(f"what hook {function.__qualname__} is given", one, spelled(function.__code__), _DEPTH)

    def _meet(self, value: Any) -> None:
        """Take note of a function with a closure, and of those that it holds (what a decorator wraps)."""
        function = getattr(value, "func", getattr(value, "__func__", value))
        if isinstance(function, FunctionType) and function.__closure__:
            met = self._functions.setdefault(function.__code__, {})
            if id(function) not in met:
                met[id(function)] = function
                for cell in function.__closure__:
                    self._meet(_content(cell))

    # ---- from one place to the next

    def _follow(self, label: str, value: Any, names: Sequence[str], depth: int) -> None:
        """Look at the places in ``value`` that ``names`` lead to."""
        if depth <= 0 or isinstance(value, PLAIN) or len(self._places) > _MOST_PLACES:
            return
        if isinstance(value, torch.Tensor):
            if id(value) not in self._places and is_small_tensor(value, self._room):
                self._room -= value.nbytes
                self._place(value, Values, label)
            return
        if isinstance(value, ModuleType):
            if value.__name__.partition(".")[0] not in _CLOSED:
                self._see_names(f"'{{}}' of module {value.__name__}", value.__dict__, names, depth)
                if ANY in names and not _is_closed(value.__name__):
                    self._see_all(f"'{{}}' of module {value.__name__}", value.__dict__)
        elif isinstance(value, type):
            self._see_class(value, names, depth)
        elif isinstance(value, CONTAINERS):
            self._see_members(label, value, names, depth)
        elif isinstance(value, (UserDict, UserList)):
            self._follow(label, value.data, names, depth)
        elif isinstance(value, ChainMap):
            self._follow(label, value.maps, names, depth)
        elif isinstance(value, tuple):
            for one in value[:MOST_MEMBERS]:
                self._follow(label, one, names, depth - 1)
        elif is_generator(value):
            if not isinstance(value, torch.Generator) and id(value) not in self._generators:
                self._generators[id(value)] = LibraryRandom.current([value])
        elif is_small_array(value):
            self._place(value, Elements, label)
        else:
            self._see_object(label, value, names, depth)

    def _see_object(self, label: str, value: Any, names: Sequence[str], depth: int) -> None:
        self._known[id(value)] = value
        own, classes = getattr(value, "__dict__", None), type(value).__mro__
        if isinstance(own, dict):
            # What its class has it may come to have itself.
            inherited = [name for name in names if any(name in one.__dict__ for one in classes)]
            self._see_names(f"'{{}}' of {label}", own, names, depth, inherited)
            if ANY in names and _is_open(type(value)):
                self._see_all(f"'{{}}' of {label}", own)
        self._meet(value)
        if isinstance(value, FunctionType):
            for one in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
                self._follow(f"a default of {value.__qualname__}", one, names, depth - 1)
        else:
            self._see_class(type(value), names, depth)

    def _see_names(
        self, label: str, holder: dict[str, Any], names: Sequence[str], depth: int, also: Sequence[str] = ()
    ) -> None:
        """Those of ``names`` that ``holder`` has, and ``also``, which it may come to have."""
        for name in names:
            if name in holder or name in also:
                value = self._place(holder, Names, label).add(name)
                self._follow(label.format(name), value, names, depth - 1)

    def _see_class(self, kind: type, names: Sequence[str], depth: int) -> None:
        """An attribute that one of its bases has may come to be hidden by another's."""
        bases = [base for base in kind.__mro__ if not _is_closed(base.__module__)]
        for base in bases if ANY in names else ():
            self._see_all(f"attribute '{{}}' of class {base.__name__}", base.__dict__, base)
        for name in names:
            if any(name in base.__dict__ for base in bases):
                for base in bases:
                    label = f"attribute '{{}}' of class {base.__name__}"
                    value = self._place(base, Names, label, base).add(name)
                    self._follow(label.format(name), value, names, depth - 1)

    def _see_all(self, label: str, holder: Any, owner: type | None = None) -> None:
        """All names of ``holder``, a namespace, and members of what they stand for; not of one with very many."""
        if len(holder) > MOST_MEMBERS or len(self._places) > _MOST_PLACES:
            return
        place = self._place(holder if owner is None else owner, Names, label, owner)
        for name in place.add_all():
            self._follow(label.format(name), holder[name], (), 1)

    def _see_members(self, label: str, value: Any, names: Sequence[str], depth: int) -> None:
        if len(value) <= self._most_members:
            self._place(value, Members, label)
            for one in islice([*value.values()] if isinstance(value, dict) else [*value], MOST_MEMBERS):
                self._follow(f"a member of {label}", one, names, depth - 1)

    def _see_environment(self, constants: Iterable[Any]) -> None:
        """Variables that the code spells."""
        held: Any = getattr(os.environ, "_data", None)
        if isinstance(held, dict):
            place = self._place(held, Names, "environment variable {}")
            for name in constants:
                if isinstance(name, str):
                    place.add(os.fsencode(name))

    def _place(self, holder: Any, kind: Any, label: str, owner: type | None = None) -> Any:
        found = self._places.get(id(holder))
        if found is None:
            found = kind(label, holder) if owner is None else kind(label, holder.__dict__, owner)
            self._places[id(holder)] = found
        return found


class Pause:
    """No generator: one that an interrupt has suspended would be closed, and go on, long after the run."""

    __slots__ = ("_outside",)

    def __init__(self, outside: Outside) -> None:
        self._outside = outside

    def __enter__(self) -> None:
        self._outside._rest()

    def __exit__(self, *_: object) -> None:
        if self._outside._runs:
            self._outside._watch()


def _is_open(kind: type) -> bool:
    """Objects of ``kind`` hold what somebody has put there: no library's own state."""
    return not _is_closed(kind.__module__) or f"{kind.__module__}.{kind.__name__}" in _NAMESPACES


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it
        return None
