"""How a traced program runs: operator by operator, or through ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

#: A program: tensors in, a tuple out.
Program = Callable[..., tuple[Any, ...]]


def run_eagerly(module: fx.GraphModule) -> Program:
    """A program as PyTorch runs it, operator by operator."""
    program: Program = module.forward
    return program


def compiled(module: fx.GraphModule) -> Program:
    """A program through ``torch.compile``: norms, rotary embeddings and gates fuse."""
    return _Compiled(module)


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
