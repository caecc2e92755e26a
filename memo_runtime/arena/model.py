"""The memory of one wrapped model's steps, wherever the model is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from memo_runtime.allocator.library import planned_allocator
from memo_runtime.arena.steps import PlannedSteps, is_planned_for_others
from memo_runtime.arena.steps_file import load_steps, save_steps
from memo_runtime.errors import AllocatorUnavailableError, OutputError
from memo_runtime.placement import ArenaReport


class StepMemory:
    """What ``layout='planned'`` is for ``model``; ``note`` tells the user what is done otherwise."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, note: Callable[[str], None]) -> None:
        self._name, self._model, self._optimizer = type(model).__name__, model, optimizer
        self._note = note
        self._steps: PlannedSteps | None = None
        self._path: Path | None = None

    def __str__(self) -> str:
        return "planned" if self._path is None else str(self._path)

    def keep_in(self, path: Path) -> None:
        """Take the addresses of steps from file ``path``, if it is there, and write those of new ones to it."""
        self._path = path

    def begin(
        self, kind: Hashable, device: torch.device, tokens: int = 0, batch: Iterable[torch.Tensor] = ()
    ) -> None:
        """A step on ``batch`` begins, of a kind that asks for the same memory as others of it with as many ``tokens``.

        Raises:
            AllocatorUnavailableError: the model is not on a CUDA device.
            AllocatorPlanError: the file of earlier runs is of something else or not whole.
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
            self._steps = self._start(index)
        self._steps.begin(kind if self._path is None else _digest(repr(kind)), tokens, batch)

    def _start(self, device: int) -> PlannedSteps:
        moved = partial(long_lived, self._model, self._optimizer)
        if self._path is None:
            return PlannedSteps(planned_allocator(), device, self._note, long_lived=moved)
        name = torch.cuda.get_device_properties(device).name
        known = load_steps(self._path, model=_model_digest(self._model), device=name)
        return PlannedSteps(
            planned_allocator(), device, self._note, long_lived=moved, known=known, on_placed=partial(self._save, name)
        )

    def _save(self, device: str) -> None:
        if self._path is None or self._steps is None:
            return
        kinds = {str(name): placements for name, placements in self._steps.placements().items()}
        try:
            save_steps(self._path, kinds, model=_model_digest(self._model), device=device)
        except OutputError as error:  # steps are served all the same
            self._note(f"the addresses of steps are not kept for the next run: {error}")

    def end(self) -> None:
        """What follows is none of the step's."""
        if self._steps is not None:
            self._steps.end()

    def close(self) -> None:
        """Plan nothing any more; where plans are kept in a file, what is under way is finished for it first."""
        if self._steps is not None:
            if self._path is not None:
                self._steps.end()
                self._steps.wait()
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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _model_digest(model: nn.Module) -> str:
    """Of names, shapes and types of parameters."""
    return _digest(repr([(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()]))
