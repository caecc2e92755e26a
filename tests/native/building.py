"""Compiling the core and the driver that imitates CUDA, for tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.house.sources import ROOT

CORE = ROOT / "csrc" / "core"
HERE = ROOT / "tests" / "native" / "cpp"
INSTALLED = ROOT / "memo_runtime" / "native" / "_core.so"


def compiler() -> str | None:
    """The C++ compiler that setup.py would take."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


def compile_together(sources: list[Path], target: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """``sources`` as one translation unit: the headers of the standard library are read once."""
    unit = target.with_suffix(".cpp")
    unit.write_text("".join(f'#include "{source}"\n' for source in sources))
    command = [*compiler().split(), "-std=c++17", "-pthread", "-Wall", "-Wextra", f"-I{CORE}", *flags]
    return subprocess.run([*command, str(unit), "-o", str(target), "-ldl"], capture_output=True, text=True, check=False)


def core_sources() -> list[Path]:
    """The sources of the core."""
    return sorted(CORE.glob("*.cpp"))


def core_library(folder: Path) -> Path:
    """The installed library where it is newer than its sources; else one that is built in ``folder``."""
    newest = max(path.stat().st_mtime for path in CORE.iterdir())
    if INSTALLED.exists() and INSTALLED.stat().st_mtime > newest:
        return INSTALLED
    target = folder / "_core.so"
    done = compile_together(core_sources(), target, "-O1", "-fPIC", "-shared", "-fvisibility=hidden")
    assert done.returncode == 0, done.stderr
    return target


def fake_driver(folder: Path, *flags: str) -> Path:
    """The library that imitates a CUDA driver."""
    target = folder / "libfake_cuda.so"
    done = compile_together([HERE / "fake_cuda.cpp"], target, "-O1", "-fPIC", "-shared", *flags)
    assert done.returncode == 0, done.stderr
    return target
