"""Compiling the arena's tests, the shell, and the CUDA runtime that imitates one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from tests.house.sources import ROOT
from tests.native.building import compiler

SOURCES = ROOT / "csrc" / "torch_allocator"
HERE = ROOT / "tests" / "allocator" / "cpp"
SANITIZERS = "address,undefined"


def compile_unit(sources: list[Path], target: Path | None, *flags: str) -> subprocess.CompletedProcess[str]:
    """``sources`` as one translation unit; without a target, only its syntax and types are checked."""
    unit = "".join(f'#include "{source}"\n' for source in sources)
    out = ["-fsyntax-only"] if target is None else ["-o", str(target)]
    flags = (*flags, f"-I{SOURCES}", f"-I{HERE}")
    command = [*compiler().split(), "-std=c++17", "-pthread", "-Wall", "-Wextra", "-Werror"]
    return subprocess.run(
        [*command, *flags, "-x", "c++", "-", *out], input=unit, capture_output=True, text=True, check=False
    )


def arena_test(folder: Path, *flags: str) -> Path:
    """The arena's test program."""
    target = folder / "arena_test"
    done = compile_unit([*sorted(SOURCES.glob("*.cpp")), HERE / "arena_test.cpp"], target, *flags)
    assert done.returncode == 0, done.stderr
    return target


def cuda_headers() -> Path | None:
    """The headers of a CUDA runtime; none where there are none."""
    packages = Path(torch.__file__).parent.parent
    tried = [*sorted(Path("/usr/local").glob("cuda*/include"), reverse=True),
             packages / "triton" / "backends" / "nvidia" / "include"]  # fmt: skip
    return next((folder for folder in tried if (folder / "crt" / "host_defines.h").exists()), None)
