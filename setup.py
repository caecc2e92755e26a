"""Builds the native parts; everything else about the package is in pyproject.toml.

    csrc/solver/*.cpp   ->  memo_solver/_search.so          the solver's search
    csrc/core/*.cpp     ->  memo_runtime/native/_core.so    pinned memory and copies

Each folder is C++17 behind a plain C interface (no Python, CUDA and no torch headers) and becomes a shared library
that is loaded with ctypes. The package works without them, only slower.

    MEMO_BUILD_EXT=auto   build where there are sources and a compiler, else install pure Python and say so
    MEMO_BUILD_EXT=on     build, and fail where that is not possible
    MEMO_BUILD_EXT=off    install pure Python
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "on", "off")
#: No -march=native: a wheel built on one machine has to run on another.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden")
NO_COMPILER = "no C++ compiler found (tried CXX, c++, g++, clang++)"
#: Module that the library lies beside, and the folder of its sources.
LIBRARIES = {"memo_solver._search": "csrc/solver", "memo_runtime.native._core": "csrc/core"}


def build_mode() -> str:
    """What ``MEMO_BUILD_EXT`` asks for."""
    mode = os.environ.get("MEMO_BUILD_EXT", "auto").strip().lower() or "auto"
    mode = {"1": "on", "0": "off"}.get(mode, mode)
    if mode not in MODES:
        raise SystemExit(f"MEMO_BUILD_EXT={mode!r} is unknown; there are: {', '.join(MODES)}")
    return mode


def find_compiler() -> str | None:
    """The system's C++ compiler: ``CXX`` where that is set, else the usual names."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


def files(folder: str, pattern: str) -> list[str]:
    """Files in ``folder``, relative to the root as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern))


def do_without(what: str, why: str) -> None:
    """Goes on without a native part in mode auto; stops in mode on."""
    if build_mode() == "on":
        raise SystemExit(f"MEMO_BUILD_EXT=on, but {what} cannot be built: {why}")
    print(f"memo-runtime: installing pure Python, without {what}: {why}", file=sys.stderr)


def native_extensions() -> list[Extension]:
    """What to build; empty where nothing is asked for, or nothing can be done."""
    if build_mode() == "off":
        return []
    if find_compiler() is None:
        do_without("the native parts", NO_COMPILER)
        return []
    found = []
    for library, folder in LIBRARIES.items():
        sources = files(folder, "*.cpp")
        if sources:
            found.append(Extension(library, sources=sources, depends=files(folder, "*.h*"), include_dirs=[folder]))
        else:
            do_without(library, f"there are no sources in {folder}")
    return found


class BuildSharedLibrary(build_ext):
    """Compiles a plain shared library in one command, since nothing in it knows of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """No interpreter tag in the name: the library serves every Python."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self) -> None:
        """Builds what can be built, side by side; what cannot is dropped from the outputs in mode auto."""
        with ThreadPoolExecutor() as pool:
            built = list(pool.map(self.compile, self.extensions))
        self.extensions = [extension for extension, done in zip(self.extensions, built, strict=True) if done]

    def compile(self, extension: Extension) -> bool:
        """Compiles one library; False where that failed and mode is auto."""
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = find_compiler()
        if compiler is None:
            do_without(extension.name, NO_COMPILER)
            return False
        includes = [f"-I{folder}" for folder in extension.include_dirs]
        command = [*compiler.split(), *FLAGS, *includes, *extension.sources, "-o", str(target), "-ldl"]
        print(" ".join(command), file=sys.stderr)
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            do_without(extension.name, "the compiler failed; its messages are above")
            return False
        return True


class AnyPythonWheel(bdist_wheel):
    """A wheel with the library is bound to a platform, but not to a version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-<platform>`` with the library, ``py3-none-any`` without."""
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildSharedLibrary, "bdist_wheel": AnyPythonWheel},
)
