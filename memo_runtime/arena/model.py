"""The memory of one wrapped model's steps, wherever the model is."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import partial

import torch
from torch import nn

from memo_runtime.allocator.library import planned_allocator
from memo_runtime.arena.steps import PlannedSteps, is_planned_for_others
from memo_runtime.errors import AllocatorUnavailableError
from memo_runtime.placement import ArenaReport


class StepMemory:
    """What ``layout='planned'`` is for ``model``; ``note`` tells the user what is done otherwise."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, note: Callable[[str], None]) -> None:
        self._name, self._model, self._optimizer = type(model).__name__, model, optimizer
        self._note = note
        self._steps: PlannedSteps | None = None

    def begin(self, kind: Hashable, device: torch.device, tokens: int = 0) -> None:
        """A step begins, of a kind that asks for the same memory as others of it with as many ``tokens``.

        Raises:
            AllocatorUnavailableError: the model is not on a CUDA device.
        """
        if device.type != "cuda":
            raise AllocatorUnavailableError(
                f"layout='planned' places the memory of CUDA devices, and {self._name} is on {device}: move the model "
                "there, or leave layout= out"
            )
        index = torch.cuda.current_device() if device.index is None else device.index
        if self._steps is None:
            if is_planned_for_others(index):
                self._note(f"memory of device {index} is planned for another wrapped model, not for this one")
                return
            moved = partial(long_lived, self._model, self._optimizer)
            self._steps = PlannedSteps(planned_allocator(), index, self._note, long_lived=moved)
        self._steps.begin(kind, tokens)

    def end(self) -> None:
        """What follows is none of the step's."""
        if self._steps is not None:
            self._steps.end()

    def close(self) -> None:
        """Plan nothing any more."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def report(self) -> ArenaReport:
        """What the latest planned step got."""
        return ArenaReport(state="no step yet") if self._steps is None else self._steps.report()


def long_lived(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[torch.Tensor]:
    """What outlives the steps of ``model``: weights, gradients that are there, buffers, states of ``optimizer``."""
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()
    for state in optimizer.state.values() if optimizer is not None else ():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
