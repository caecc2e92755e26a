"""What contenders need from others, and what a row says where it is not there."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


class SkippedError(RuntimeError):
    """A contender cannot run here: it is not installed, or not made for this. Says what would change that."""


@dataclass(frozen=True, slots=True)
class Package:
    """A distribution that is imported, and the version that the adapter was written for; None: any."""

    module: str
    name: str
    version: str | None

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return self.name if self.version is None else f"{self.name}=={self.version}"

    @property
    def is_there(self) -> bool:
        """Whether it can be imported; it is not, but for packages that it is in."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:
            return False


DEEPSPEED = Package("deepspeed", "deepspeed", "0.19.8")
LIGER = Package("liger_kernel", "liger-kernel", "0.8.5")
MEGATRON = Package("megatron.core", "megatron-core", "0.19.2")
TRAINSTREAM = Package("trainstream", "trainstream", "0.4.1")
#: PyTorch brings the one that belongs to it where there is a GPU; Megatron-core imports it anywhere.
TRITON = Package("triton", "triton", None)
TRL = Package("trl", "trl", "1.16.0")


def need(contender: str, packages: Sequence[Package]) -> None:
    """That all ``packages`` are there.

    Raises:
        SkippedError: one is missing; has the line that installs all of them.
    """
    missing = [package.name for package in packages if not package.is_there]
    if missing:
        line = " ".join(package.requirement for package in packages)
        raise SkippedError(f"{contender} needs {' and '.join(missing)}, not installed here: pip install {line}")


def imported(contender: str, package: Package, module: str) -> Any:
    """``module`` of ``package``, which is there.

    Raises:
        SkippedError: it cannot be imported, for want of what it needs itself or of a compiler; says what was missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SkippedError(
            f"{contender} has {package.name}, which cannot be imported here ({error}): pip install "
            f"{package.requirement}, with all that it needs"
        ) from error


def need_gpu(contender: str, device: torch.device, reason: str) -> None:
    """That it runs on a GPU.

    Raises:
        SkippedError: it does not; says why it has to.
    """
    if device.type != "cuda":
        raise SkippedError(f"{contender} runs on CUDA GPUs only ({reason}): use --device cuda")
