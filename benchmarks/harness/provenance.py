"""Where and with what a row was measured. Needs no torch."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch", "transformers", "pulp", "ortools", "triton", "nvidia-cudnn-cu13", "liger-kernel", "trl", "accelerate",
    "peft", "deepspeed", "megatron-core", "trainstream",
)  # fmt: skip


def package_version(package: str) -> str | None:
    """Installed version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of what is installed of ``packages``."""
    found = {package: package_version(package) for package in packages}
    return {"python": platform.python_version(), **{name: text for name, text in found.items() if text is not None}}


def allocator() -> str | None:
    """What the environment tells PyTorch's allocator, which every contender's process inherits; None: nothing."""
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or None


def gpu_facts() -> dict[str, str]:
    """Name and driver of the first GPU, from the driver itself.

    Raises:
        OSError, subprocess.CalledProcessError: there is no driver to ask.
    """
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    return {"gpu": name, "driver": driver}


def cpu_name() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


#: Where a file that nobody has committed yet may be imported from.
_CODE = ("memo_runtime/", "solver/", "benchmarks/", "examples/", "csrc/", "setup.py", "pyproject.toml")


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def commit() -> str | None:
    """The checkout's commit, marked where the tree differs from it; None where this is no checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-changed" if any(map(_runs, changed.splitlines())) else head


def _runs(line: str) -> bool:
    """A line of ``git status`` is of something that a run is made of.

    Rows are written into the tree while it goes on, and new files may lie anywhere: rows, traces, notes.
    """
    what, path = line[:2], line[3:]
    return not path.startswith("benchmarks/results/") and (what != "??" or path.startswith(_CODE))


def machine(*, cuda: bool) -> dict[str, Any]:
    """Device, driver and processor; the load says how shared the machine was."""
    gpu: dict[str, Any] = gpu_facts() if cuda else {"gpu": None, "driver": None}
    return {**gpu, "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))}
