"""Building the allocator against the installed torch.

No CUDA toolkit is needed: torch's wheel brings its headers and libraries, and Triton's, which torch for CUDA needs on
Linux, those of the CUDA runtime.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from memo_runtime.allocator.versions import KNOWN, library_path, running, standard
from memo_runtime.errors import AllocatorUnavailableError

_SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "torch_allocator"
_FLAGS = ("-O2", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden")


def build(target: Path | None = None) -> Path:
    """Compile the allocator for the torch that is running, which takes ten seconds or so; returns the library.

    Raises:
        AllocatorUnavailableError: torch, its headers, the compiler or the sources are not there or not known; the
            compiler's messages where it failed.
    """
    minor = running()
    if minor not in KNOWN:
        raise AllocatorUnavailableError(
            f"torch {minor} is running, and the allocator can be built for torch {', '.join(KNOWN)}"
        )
    if torch.version.cuda is None:
        raise AllocatorUnavailableError(f"torch {torch.__version__} is built without CUDA")
    if not _SOURCES.is_dir():
        raise AllocatorUnavailableError(
            f"its sources are not at {_SOURCES}: install memo_runtime from a checkout (pip install -e .)"
        )
    target = library_path(minor) if target is None else target
    made = target.with_suffix(f".{os.getpid()}.so")
    try:
        done = subprocess.run(
            _command(made), input=_unit(), capture_output=True, encoding="utf-8", errors="replace", check=False
        )
        if done.returncode != 0:
            raise AllocatorUnavailableError(f"the compiler failed:\n{done.stderr[-4000:]}")
        os.replace(made, target)  # a process that has the old one open keeps it
    except OSError as error:
        raise AllocatorUnavailableError(f"the allocator cannot be built at {target}: {error}") from None
    finally:
        made.unlink(missing_ok=True)
    return target


def _unit() -> str:
    """All sources as one: torch's headers are read once."""
    files = [*sorted(_SOURCES.glob("*.cpp")), *sorted((_SOURCES / "shell").glob("*.cpp"))]
    return "".join(f'#include "{path}"\n' for path in files)


def _command(target: Path) -> list[str]:
    torch_home = Path(torch.__file__).parent
    libraries = torch_home / "lib"
    includes = [f"-I{_SOURCES}", f"-I{_SOURCES / 'shell'}", "-isystem", str(torch_home / "include")]
    return [
        *_compiler(), f"-std={standard(running())}", *_FLAGS, *includes, "-isystem", str(_cuda_headers()),
        "-x", "c++", "-", "-x", "none", "-o", str(target),
        f"-L{libraries}", "-lc10", "-lc10_cuda", str(_cuda_runtime()),
    ]  # fmt: skip


def _compiler() -> list[str]:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name.split()
    raise AllocatorUnavailableError("no C++ compiler found (tried CXX, c++, g++, clang++)")


def _folders(toolkit: str, wheels: str) -> Iterator[Path]:
    """Folders of a CUDA toolkit's part, then of the wheels that torch brings."""
    for home in (os.environ.get("CUDA_HOME"), f"/usr/local/cuda-{torch.version.cuda}", "/usr/local/cuda"):
        if home:
            yield Path(home) / toolkit
    packages = Path(torch.__file__).parent.parent
    major = str(torch.version.cuda).partition(".")[0]
    yield packages / "nvidia" / f"cu{major}" / wheels
    yield packages / "nvidia" / "cuda_runtime" / wheels


def _cuda_headers() -> Path:
    triton = Path(torch.__file__).parent.parent / "triton" / "backends" / "nvidia" / "include"
    tried = [*_folders("include", "include"), triton]
    for folder in tried:
        # Wheels of the runtime may come without the second, which the first includes.
        if (folder / "cuda_runtime_api.h").exists() and (folder / "crt" / "host_defines.h").exists():
            return folder
    raise AllocatorUnavailableError(f"no CUDA headers found; looked in {', '.join(map(str, tried))}")


def _cuda_runtime() -> Path:
    """The runtime library that torch loads."""
    major = str(torch.version.cuda).partition(".")[0]
    own = [Path(torch.__file__).parent / "lib", *_folders("lib64", "lib")]
    for folder in [own[0], *own[-2:], *own[1:-2]]:
        found = sorted(folder.glob(f"libcudart*.so.{major}*"))
        if found:
            return found[0]
    raise AllocatorUnavailableError(f"no libcudart.so.{major} found; looked in {', '.join(map(str, own))}")
