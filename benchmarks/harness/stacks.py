"""What scope ``blocks`` runs, as a model for ``memo plan`` and ``memo fit``: their forecasts beside rehearsed lengths.

    memo fit --model benchmarks.harness.stacks:llama_8b --gpu h200-141gb --budget 78GiB --optimizer none

Runs from the root of a checkout. The gradient of the result is given, and held to the end of the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.autograd import Function

from benchmarks.harness.geometry import Scope
from benchmarks.harness.job import Settings
from benchmarks.harness.subject import Subject

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

#: Of the batch that shows how blocks are called.
_TOKENS = 64
#: More than anything here reaches.
_POSITIONS = 1 << 22


class _Ends(Function):
    """A scalar whose gradient is the given one."""

    @staticmethod
    def forward(ctx: FunctionCtx, result: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return result.new_zeros(())

    @staticmethod
    def backward(ctx: FunctionCtx, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None


class GivenGradient(nn.Module):
    """A stack of blocks whose backward starts with a gradient that is an argument too."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Hidden states and gradient [1, tokens, hidden] -> a scalar."""
        ended: torch.Tensor = _Ends.apply(self.stack(hidden), gradient)
        return ended


def llama_8b() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """The 4 blocks of ``llama-8b`` in bfloat16, and a batch for them; the device is torch's default."""
    settings = Settings(
        geometry="llama-8b", scope=Scope.BLOCKS, blocks=4, dtype="bfloat16", attention="auto",
        device=str(torch.get_default_device()),
    )  # fmt: skip
    subject = Subject(settings, longest=_POSITIONS)
    size = (1, _TOKENS, subject.config.hidden_size)
    hidden, gradient = (torch.empty(size, dtype=torch.bfloat16) for _ in range(2))
    return GivenGradient(subject.model), (hidden.requires_grad_(), gradient)
