"""What is installed, what of it loads, and why the rest does not.

Everything is looked up when asked for and imported one by one, so that a broken package is a line in the
answer instead of the end of it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

_EXTRAS = {"hf": "memo-runtime[hf]", "kernels": "memo-runtime[kernels]", "cuda": "memo-runtime[cuda]"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One package: its version, whether it loads, and what there is to say about it.

    Nothing trains without the ``needed`` packages; the others add to what the runtime can do.
    """

    name: str
    version: str | None
    loads: bool
    needed: bool
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """The machine as far as Python sees it."""

    python: str
    platform: str
    processors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    distribution: str
    module: str
    extra: str = ""
    #: What there is without it, where it is installed by default and nevertheless not needed to train.
    without: str = ""
    detail: Callable[[], str] = str


def _torch_detail() -> str:
    torch = import_module("torch")
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for ROCm {torch.version.hip}" if torch.version.hip else "built for the CPU"


def _pulp_detail() -> str:
    solvers = import_module("pulp").listSolvers(onlyAvailable=True)
    return "solvers: " + (", ".join(solvers) or "none")


_WANTED = (
    _Wanted(distribution="torch", module="torch", detail=_torch_detail),
    _Wanted(distribution="numpy", module="numpy"),
    _Wanted(
        distribution="pulp",
        module="pulp",
        detail=_pulp_detail,
        without="policies 'auto' and 'replay' choose among simpler plans",
    ),
    _Wanted(
        distribution="ortools",
        module="ortools.sat.python.cp_model",
        without="'memo solve' searches without CP-SAT",
    ),
    _Wanted(distribution="psutil", module="psutil"),
    _Wanted(distribution="transformers", module="transformers", extra="hf"),
    _Wanted(distribution="peft", module="peft", extra="hf"),
    _Wanted(distribution="accelerate", module="accelerate", extra="hf"),
    _Wanted(distribution="liger-kernel", module="liger_kernel.transformers", extra="kernels"),
    _Wanted(distribution="cuda-python", module="cuda.bindings.driver", extra="cuda"),
    _Wanted(distribution="flash-attn", module="flash_attn", extra="none"),
)


def system() -> System:
    """Python, operating system and the processors this process may use."""
    return System(
        python=platform.python_version(),
        platform=platform.platform(),
        processors=len(os.sched_getaffinity(0)),
    )


def packages() -> tuple[Package, ...]:
    """Every package the runtime needs or can use, loaded to see whether that works."""
    return tuple(_examine(wanted) for wanted in _WANTED)


def _examine(wanted: _Wanted) -> Package:
    needed = not wanted.extra and not wanted.without
    try:
        found: str | None = version(wanted.distribution)
    except PackageNotFoundError:
        found = None
    try:
        import_module(wanted.module)
        detail = wanted.detail()
    except Exception as error:  # a package that fails to load may raise anything
        detail = _missing(wanted) if found is None else f"{type(error).__name__}: {_first_line(error)}"
        return Package(name=wanted.distribution, version=found, loads=False, needed=needed, detail=detail)
    return Package(name=wanted.distribution, version=found, loads=True, needed=needed, detail=detail)


def _missing(wanted: _Wanted) -> str:
    if wanted.extra in _EXTRAS:
        return f"not installed; pip install '{_EXTRAS[wanted.extra]}'"
    if wanted.without:
        return f"not installed: {wanted.without}; pip install {wanted.distribution}"
    return "not installed; pip install memo-runtime" if not wanted.extra else "not installed; optional"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "no message"
