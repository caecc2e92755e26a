"""How a traced program runs: operator by operator, or through the compiler of ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

#: A program: tensors in, a tuple out.
Program = Callable[..., tuple[Any, ...]]
#: Makes a program of a graph, which nobody changes any more.
Compiler = Callable[[fx.Graph], Program]


class NotCompiledError(RuntimeError):
    """TorchInductor could not compile a program; with its words."""


def as_module(graph: fx.Graph) -> fx.GraphModule:
    """``graph`` as code, which is written here: it must be whole."""
    return fx.GraphModule(torch.nn.Module(), graph)


def run_eagerly(graph: fx.Graph) -> Eager:
    """A program as PyTorch runs it, operator by operator."""
    return Eager(graph)


def compiled(graph: fx.Graph) -> Program:
    """A program through TorchInductor: norms, rotary embeddings and gates fuse."""
    return _Compiled(as_module(graph))


class Eager:
    """A program whose code is written when it first runs: of those that are traced for what they take none does."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._program: Program | None = None

    def __call__(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """Run it."""
        if self._program is None:
            self._program = as_module(self.graph).forward
        return self._program(*tensors)


class _Compiled:
    """A program that is compiled, and tuned, in its first call, for tensors laid out as those.

    It is a graph already, and whoever calls it knows how its tensors are laid out (``ProgramCache``): ``torch.compile``
    would trace it once more, and compare all of them at every call: host time that short steps wait for.

    The tuner tries every kernel a few times, and copies what a kernel writes to into pinned memory meanwhile, where it
    finds no room on the device. PyTorch would hold these copies for good, beside all that was planned for the host.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._program: Program | None = None

    def __call__(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        if self._program is not None:
            return self._program(*tensors)
        self._program = self._module.forward if is_switched_off() else through_inductor(self._module, tensors)
        results = self._program(*tensors)
        let_go_of_pinned_memory()
        return results


def is_switched_off() -> bool:
    """Nothing shall be compiled in this process (``TORCH_COMPILE_DISABLE``)."""
    # It takes a second to import, and the compiler as well, which only a GPU needs.
    from torch._dynamo import config

    return bool(config.disable)


def through_inductor(module: fx.GraphModule, given: Sequence[Any]) -> Program:
    """``module`` as machine code for tensors, and numbers, like ``given``.

    Raises:
        NotCompiledError: that failed.
    """
    from torch._inductor import compile as compile_one

    try:
        with torch.no_grad():
            return compile_one(module, list(given))  # type: ignore[no-any-return]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise NotCompiledError(str(error)) from error


def let_go_of_pinned_memory() -> None:
    """Give back what PyTorch's allocator of pinned memory holds and nobody uses."""
    if torch.cuda.is_initialized():
        torch._C._host_emptyCache()
