"""The hook in front of a wrapped model's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memo_runtime.errors import MemoError

_NOT_COMPILED = (
    "memo_runtime plans in front of every step of a wrapped model, which is not traced: compile without fullgraph=True "
    "or call memo.unwrap(model), to export it too"
)


class Gate:
    """Forward pre-hook that calls ``before_forward`` with the arguments of the model.

    Raises:
        MemoError: the model is a copy of the one that was wrapped.
    """

    def __init__(self, before_forward: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        self._before_forward = before_forward

    @torch.compiler.disable(reason=_NOT_COMPILED)  # type: ignore[untyped-decorator]
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is about to run."""
        if getattr(model, "_is_replica", False):
            raise MemoError(
                f"nn.DataParallel runs copies of {type(model).__name__} on several devices, and its blocks are managed "
                "on one: use DistributedDataParallel (torchrun), or set CUDA_VISIBLE_DEVICES to one device, or call "
                "memo.unwrap(model)"
            )
        self._before_forward(args, kwargs)
