"""How a traced program runs: operator by operator, or through ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

#: A program: tensors in, a tuple out.
Program = Callable[..., tuple[Any, ...]]
#: Makes a program of a graph, which nobody changes any more.
Compiler = Callable[[fx.Graph], Program]


def as_module(graph: fx.Graph) -> fx.GraphModule:
    """``graph`` as code, which is written here: it must be whole."""
    return fx.GraphModule(torch.nn.Module(), graph)


def run_eagerly(graph: fx.Graph) -> Program:
    """A program as PyTorch runs it, operator by operator."""
    return _Eager(graph)


def compiled(graph: fx.Graph) -> Program:
    """A program through ``torch.compile``: norms, rotary embeddings and gates fuse."""
    return _Compiled(as_module(graph))


class _Eager:
    """A program whose code is written when it first runs: of those that are traced for what they take none does."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._program: Program | None = None

    def __call__(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        if self._program is None:
            self._program = as_module(self._graph).forward
        return self._program(*tensors)


class _Compiled:
    """A compiled program, which is tuned in its first call.

    The tuner tries every kernel a few times, and copies what a kernel writes to into pinned memory meanwhile, where it
    finds no room on the device. PyTorch would hold these copies for good, beside all that was planned for the host.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._program: Program = torch.compile(module, fullgraph=True, dynamic=False)
        self._tuned = False

    def __call__(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        results = self._program(*tensors)
        if not self._tuned:
            self._tuned = True
            _let_go_of_pinned_memory()
        return results


def _let_go_of_pinned_memory() -> None:
    """Give back what PyTorch's allocator of pinned memory holds and nobody uses."""
    if torch.cuda.is_initialized():
        torch._C._host_emptyCache()
