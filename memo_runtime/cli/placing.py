"""Models and batches to the device and dtype asked for."""

from __future__ import annotations

from typing import Any

import torch
import typer
from torch import nn
from torch.utils import _pytree as pytree

from memo_runtime.errors import DeviceUnavailableError


def find_device(name: str) -> torch.device:
    """The device called ``name``.

    Raises:
        typer.BadParameter: no name of a device that the runtime can use.
        DeviceUnavailableError: there is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(f"'{name}' is no device: give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"'{name}' is not supported: give cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            found = f"{count} CUDA devices" if count else "no CUDA device"
            raise DeviceUnavailableError(f"{name} was asked for and there is {found}; try --device cpu")
    return device


def place(model: nn.Module, batch: Any, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """``model`` and ``batch`` on ``device``, everything of floating point in ``dtype``."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.to(device, dtype if leaf.is_floating_point() else None)

    return model.to(device, dtype), pytree.tree_map(move, batch)
