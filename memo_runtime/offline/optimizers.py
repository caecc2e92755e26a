"""Optimizers by name, the bytes of their states, and what their steps take besides."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from memo_runtime.errors import ArgumentError
from memo_runtime.profiling.states import gradient_bytes, measure_states
from memo_runtime.profiling.stepping import fused_bytes, stepping_of
from memo_runtime.records import ModelStates

#: 8-bit states have a scale in float32 for each block of so many (bitsandbytes' block-wise quantisation).
_QUANTISED_BLOCK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """One optimizer.

    Attributes:
        about: what it keeps for each trained parameter, and ``size`` the bytes of that.
        made: the one of PyTorch whose step has temporaries; None: it steps by kernels that need no room.
    """

    name: str
    about: str
    size: Callable[[nn.Parameter], float]
    made: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer] | None = None

    def states(self, model: nn.Module) -> ModelStates:
        """The states of ``model`` when this optimizer has stepped, without its step counters."""
        trained = [p for p in model.parameters() if p.requires_grad]
        total = round(sum(self.size(p) for p in trained))
        found = measure_states(model, None, "cuda")
        step = None if self.made is None or not trained else stepping_of(self.made(trained), "cuda")
        stepping = 0 if step is None else step.temporaries
        return replace(found, optimizer=total, optimizer_name=self.name, assumed=False, stepping=stepping)

    def moved(self, model: nn.Module) -> int:
        """Bytes that its step reads and writes: by one kernel, or as PyTorch's does where that has temporaries."""
        if self.name == "none":
            return 0
        trained = [p for p in model.parameters() if p.requires_grad]
        step = None if self.made is None or not trained else stepping_of(self.made(trained), "cuda")
        parameters, states = sum(p.nbytes for p in trained), round(sum(self.size(p) for p in trained))
        return fused_bytes(parameters, sum(map(gradient_bytes, trained)), states) if step is None else step.moved


def _with_master(parameter: nn.Parameter) -> float:
    return parameter.numel() * (8.0 + (4.0 if parameter.element_size() < 4 else 0.0))


def _factored(parameter: nn.Parameter) -> float:
    """In float32: a row and a column for a matrix, all elements of anything else."""
    if parameter.dim() < 2:
        return 4.0 * parameter.numel()
    return 4.0 * parameter.numel() * (1 / parameter.shape[-1] + 1 / parameter.shape[-2])


OPTIMIZERS: dict[str, Optimizer] = {
    one.name: one
    for one in (
        Optimizer(
            name="adamw", about="two states in the parameters' dtype, no master copy, fused=True",
            size=lambda p: 2.0 * p.nbytes,
        ),
        Optimizer(
            name="adamw-foreach", about="likewise, with PyTorch's default step: temporaries as large as the parameters",
            size=lambda p: 2.0 * p.nbytes, made=lambda trained: torch.optim.AdamW(trained, foreach=True),
        ),
        Optimizer(name="adamw-bf16", about="two states in bf16", size=lambda p: 4.0 * p.numel()),
        Optimizer(
            name="adamw-fp32", about="two states and, for narrower parameters, a master copy in float32",
            size=_with_master,
        ),
        Optimizer(
            name="adamw-8bit", about="two states of 8 bits, and their scales",
            size=lambda p: p.numel() * (2.0 + 8.0 / _QUANTISED_BLOCK),
        ),
        Optimizer(
            name="adafactor", about="a row and a column for each matrix, in float32", size=_factored,
            made=torch.optim.Adafactor,
        ),
        Optimizer(name="sgd-momentum", about="one state in the parameters' dtype", size=lambda p: 1.0 * p.nbytes),
        Optimizer(name="sgd", about="nothing", size=lambda p: 0.0),
        Optimizer(name="none", about="nothing: gradients alone", size=lambda p: 0.0),
    )
}  # fmt: skip


def find_optimizer(name: str) -> Optimizer:
    """The optimizer called ``name``.

    Raises:
        ArgumentError: there is none; names those that are near.
    """
    wanted = name.strip().lower().replace("_", "-")
    if wanted in OPTIMIZERS:
        return OPTIMIZERS[wanted]
    near = difflib.get_close_matches(wanted, OPTIMIZERS, n=2, cutoff=0.5)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    known = ", ".join(f"{one.name} ({one.about})" for one in OPTIMIZERS.values())
    raise ArgumentError(f"--optimizer {name} is unknown: {meant}there are {known}")
