"""Putting things into a module instance so that copies and pickles of the module do not carry them.

``wrap`` works in place: the class, the parameter names and the state_dict of a module stay as they are, only
its instance ``__dict__`` gains entries (a ``forward``, hooks). ``copy.deepcopy`` and ``pickle`` read an object's
state through ``__getstate__``, looked up on the instance, so an instance ``__getstate__`` that leaves those
entries out makes every copy an ordinary, unwrapped module:

    module.__dict__ = {..., "forward": executor, "__getstate__": _CleanState}
    deepcopy(module).__dict__ = {...}
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

_ABSENT = object()
_HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class _CleanState:
    """Instance ``__getstate__`` of a module: its state as it was before anything was installed."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.entries: dict[str, Any] = {}  # name -> value before, or _ABSENT
        self.hooks: dict[int, RemovableHandle] = {}

    def __call__(self) -> dict[str, Any]:
        module = self._module()
        assert module is not None, "a module outlives the state object in its own __dict__"
        base = getattr(type(module), "__getstate__", None)
        state = dict(module.__dict__)
        if base is not None and base is not object.__getstate__:
            state = dict(base(module))
        state.pop("__getstate__", None)
        for name, before in self.entries.items():
            if before is _ABSENT:
                state.pop(name, None)
            else:
                state[name] = before
        for table in _HOOK_TABLES:
            if table in state and self.hooks:
                kept = state[table].copy()
                for identifier in self.hooks:
                    kept.pop(identifier, None)
                state[table] = kept
        return state


def _clean_state(module: nn.Module) -> _CleanState:
    state = module.__dict__.get("__getstate__")
    if not isinstance(state, _CleanState):
        state = _CleanState(module)
        module.__dict__["__getstate__"] = state
    return state


def _drop_if_empty(module: nn.Module) -> None:
    state = module.__dict__.get("__getstate__")
    if isinstance(state, _CleanState) and not state.entries and not state.hooks:
        del module.__dict__["__getstate__"]


def place(module: nn.Module, name: str, value: Any) -> None:
    """Set instance attribute ``name`` of ``module`` such that copies and pickles keep the value from before."""
    state = _clean_state(module)
    if name not in state.entries:
        state.entries[name] = module.__dict__.get(name, _ABSENT)
    module.__dict__[name] = value


def take_back(module: nn.Module, name: str) -> None:
    """Undo ``place``: restore what ``name`` was before. Does nothing where nothing was placed."""
    state = module.__dict__.get("__getstate__")
    if not isinstance(state, _CleanState) or name not in state.entries:
        return
    before = state.entries.pop(name)
    if before is _ABSENT:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = before
    _drop_if_empty(module)


def install_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace ``module.forward`` in place; ``module.__call__`` and its hooks stay as they are."""
    place(module, "forward", forward)


def remove_forward(module: nn.Module) -> None:
    """Restore the forward that ``install_forward`` replaced."""
    take_back(module, "forward")


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that runs without us: one set on the instance before, else the class's, bound."""
    state = module.__dict__.get("__getstate__")
    before: Any = state.entries.get("forward", _ABSENT) if isinstance(state, _CleanState) else _ABSENT
    if before is _ABSENT:
        before = type(module).forward.__get__(module)
    forward: Callable[..., Any] = before
    return forward


def install_pre_hook(module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    """Register a forward pre-hook (with keyword arguments, before all others) that copies do not carry."""
    handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    _clean_state(module).hooks[handle.id] = handle
    return handle


def remove_pre_hook(module: nn.Module, handle: RemovableHandle) -> None:
    """Undo ``install_pre_hook``."""
    handle.remove()
    state = module.__dict__.get("__getstate__")
    if isinstance(state, _CleanState):
        state.hooks.pop(handle.id, None)
        _drop_if_empty(module)
