"""Which torch is running, and which the allocator can be built for."""

from __future__ import annotations

from pathlib import Path

import torch

#: Minors whose allocator interface csrc/torch_allocator/shell knows.
KNOWN = ("2.11", "2.12", "2.13", "2.14")
BUILD_COMMAND = "python -m memo_runtime.allocator"


def running() -> str:
    """The minor of torch, as "2.11"."""
    major, minor = torch.__version__.split(".")[:2]
    return f"{major}.{minor}"


def number(minor: str) -> int:
    """A minor as the library writes it: 1000 * major + minor."""
    major, _, small = minor.partition(".")
    return 1000 * int(major) + int(small)


def standard(minor: str) -> str:
    """The C++ that headers of torch ``minor`` need at least."""
    return "c++20" if number(minor) >= number("2.14") else "c++17"


def library_path(minor: str) -> Path:
    """Where the library for ``minor`` lies."""
    return Path(__file__).with_name(f"_alloc_{minor.replace('.', '_')}.so")
