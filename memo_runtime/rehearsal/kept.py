"""What a rehearsal must leave as it was: gradients, buffers, attributes, generators, and what an optimizer steps.

What a step writes over is copied to ordinary host memory and written back. Gradients that exist stay where they are
while the step is rehearsed, which so adds to them as it will in training; where there are none, there are none again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.ambient import RandomState
from memo_runtime.blocks.reach import reach
from memo_runtime.blocks.state import LibraryRandom, shared_generators
from memo_runtime.blocks.undo import Undo

Copies = list[tuple[torch.Tensor, torch.Tensor]]


def _copied(tensors: Iterable[torch.Tensor]) -> Copies:
    return [(one, one.detach().to("cpu", copy=True)) for one in tensors]


def _put_back(copies: Copies) -> None:
    with torch.no_grad():
        for one, before in copies:
            one.detach().copy_(before)


class _Optimizer:
    """State and parameters of an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, restore: bool) -> None:
        self._inner: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps optimizers
        self._restore = restore
        self._state = {parameter: dict(state) for parameter, state in self._inner.state.items()}
        self._plain = {
            name: value for name, value in vars(self._inner).items() if isinstance(value, (bool, int, float))
        }
        stepped = [one for group in self._inner.param_groups for one in group["params"]]
        held = [value for state in self._state.values() for value in state.values() if isinstance(value, torch.Tensor)]
        self._copies = _copied([*stepped, *held]) if restore else []

    def put_back(self) -> None:
        """State that was made is dropped, and what was there is as it was."""
        _put_back(self._copies)
        if self._restore or not self._state:
            self._inner.state.clear()
            self._inner.state.update(self._state)
        vars(self._inner).update(self._plain)


class Kept:
    """The state of a model, an optimizer and the tensors of a batch, now; ``put_back`` makes it the present one.

    ``restore`` False: parameters and an optimizer's existing state are not copied, and stay changed.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Iterable[torch.Tensor],
        optimizer: torch.optim.Optimizer | None,
        device: torch.device,
        *,
        restore: bool,
    ) -> None:
        self._leaves = [one for one in (*model.parameters(), *inputs) if one.is_leaf and one.requires_grad]
        self._grads = {id(one): one.grad for one in self._leaves}
        self._copies = _copied([*(one.grad for one in self._leaves if one.grad is not None), *model.buffers()])
        self._reach = reach([("model", model)])
        self._optimizer = None if optimizer is None else _Optimizer(optimizer, restore=restore)
        self._random = RandomState.current(device)
        self._library = LibraryRandom.current([*self._reach.generators, *shared_generators()])
        self.has_leaf_hooks = self._reach.has_leaf_hooks
        self._hooks: Undo | None = None

    def leave_out_hooks(self) -> None:
        """Take hooks on parameters away: an optimizer that steps in them would train on what stand-ins yield."""
        self._hooks = self._reach.without_leaf_hooks()

    def start_again(self) -> None:
        """Gradients as a step finds them."""
        for one in self._leaves:
            one.grad = self._grads[id(one)]

    def put_back(self) -> None:
        """Everything is as it was."""
        self.start_again()
        if self._hooks is not None:
            self._hooks()
        for index in self._reach.changed():
            self._reach.cells[index].write(self._reach.contents[index])
        _put_back(self._copies)
        if self._optimizer is not None:
            self._optimizer.put_back()
        self._random.set()
        self._library.set()
