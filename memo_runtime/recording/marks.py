"""Marks of blocks: hooks that tell a recorder where forward, rerun and backward of each block begin and end.

Backward of a block goes from the gradient of its result to the gradient of its input. Both are seen by hooks on
those two tensors, which add no node to the graph and hold nothing:

    forward     x ---[ block ]--- y          backward     dx ---[ block ]--- dy
                ^ begin         ^ end                     ^ end             ^ begin
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree

from memo_runtime.traces.trace import Phase


class Recorder(Protocol):
    """Whoever wants to know."""

    def begin(self, phase: Phase, block: str = "") -> None:
        """A span begins."""

    def end(self, phase: Phase, block: str = "") -> None:
        """It ends."""


@contextmanager
def marked(blocks: Iterable[tuple[str, nn.Module]], recorder: Recorder) -> Iterator[None]:
    """While this is open, calls of ``blocks`` (name, module) are told to ``recorder``."""
    handles: list[Any] = []
    for name, block in blocks:
        hooks = _BlockHooks(name, recorder)
        handles.append(block.register_forward_pre_hook(hooks.before, with_kwargs=True))
        # Also where a rerun ends early, by an exception, at the last tensor that is needed.
        handles.append(block.register_forward_hook(hooks.after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _BlockHooks:
    """The hooks of one block."""

    def __init__(self, name: str, recorder: Recorder) -> None:
        self._name = name
        self._recorder = recorder

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _goes_backward():
            self._recorder.begin(Phase.RERUN, self._name)
            return
        self._recorder.begin(Phase.FORWARD, self._name)
        _on_gradient((args, kwargs), partial(self._recorder.end, Phase.BACKWARD, self._name))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _goes_backward():
            self._recorder.end(Phase.RERUN, self._name)
            return
        _on_gradient(output, partial(self._recorder.begin, Phase.BACKWARD, self._name))
        self._recorder.end(Phase.FORWARD, self._name)


def _goes_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _on_gradient(values: Any, tell: Any) -> None:
    """Call ``tell`` when the gradient of the first tensor of ``values`` that has one is there."""
    for value in _pytree.tree_leaves(values):
        if isinstance(value, torch.Tensor) and value.requires_grad:
            value.register_hook(partial(_told, tell))
            return


def _told(tell: Any, gradient: torch.Tensor) -> None:
    tell()
