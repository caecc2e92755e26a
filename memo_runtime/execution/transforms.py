"""Ways of running a model in which what its blocks save is no memory that could be copied: refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from memo_runtime.blocks.containers import leaves_of
from memo_runtime.errors import MemoError


def refuse_transforms(model: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise if ``model`` is transformed, or traced, as it runs.

    Raises:
        MemoError: by a transform of ``torch.func``, in forward mode (dual tensors), by ``torch.jit.trace`` or
            ``torch.export``, or on fake tensors; says what would work.
    """
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is not None:
        name = interpreter.key().name.lower()
        raise MemoError(
            f"torch.func runs {model} inside a transform ({name}): what its blocks save there can be neither copied "
            "nor made again. Would work: memo.unwrap(model) before the transform, torch.no_grad() around it if no "
            "gradient is taken, or torch.autograd.grad(model(x), ...) instead of torch.func.grad"
        )
    if forward_ad._current_level >= 0:
        raise MemoError(
            f"{model} runs in forward mode (torch.autograd.forward_ad.dual_level): what its blocks save there may have "
            "no memory. Would work: memo.unwrap(model) before it, or torch.no_grad() inside it, which leaves tangents "
            "as they are"
        )
    if torch.jit.is_tracing() or any(isinstance(leaf, FakeTensor) for leaf in leaves_of((args, kwargs))):
        raise MemoError(
            f"{model} is traced (torch.export, torch.jit.trace, fake tensors), which leaves nothing to manage. Would "
            "work: torch.no_grad() around it, or memo.unwrap(model) before it"
        )
