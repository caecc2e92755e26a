"""Wheels, with the native libraries and without."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.house.sources import ROOT

pytest.importorskip("setuptools", minversion="77")
BROKEN = "#error not today\n"
WORKS = 'extern "C" int nothing() { return 0; }\n'
SOURCES = sorted((ROOT / "csrc" / "solver").glob("*.cpp"))
needs_compiler = pytest.mark.skipif(
    not SOURCES or not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    reason="needs the native sources and a C++ compiler",
)


@pytest.fixture
def checkout(tmp_path):
    """What a build reads, away from the working tree."""
    root = tmp_path / "checkout"
    root.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("memo_runtime", "solver", "csrc"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, root / name, ignore=ignored)
    return root


def replace_sources(checkout, library, text):
    """One source in place of all: a compiler goes through the others too, whatever it finds in one."""
    for source in (checkout / "csrc" / library).glob("*.cpp"):
        source.unlink()
    (checkout / "csrc" / library / "only.cpp").write_text(text)


def build(checkout, mode, *, path=None):
    environment = {**os.environ, "MEMO_BUILD_EXT": mode}
    environment.pop("CXX", None)
    if path is not None:
        environment["PATH"] = path
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", "out"]
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    wheels = list((checkout / "out").glob("*.whl"))
    return result, wheels[0] if wheels else None


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_a_pure_wheel_has_both_packages_and_their_types(checkout):
    result, wheel = build(checkout, "off")
    assert result.returncode == 0, result.stderr
    assert wheel.name.endswith("-py3-none-any.whl")
    names = contents(wheel)
    assert {"memo_runtime/__init__.py", "memo_runtime/py.typed", "memo_runtime/cli/app.py"} <= names
    assert {"memo_solver/__init__.py", "memo_solver/py.typed"} <= names
    assert not any(name.startswith(("tests", "solver/")) or name.endswith(".so") for name in names)


@pytest.mark.slow
@needs_compiler
def test_a_wheel_with_the_libraries_serves_every_python_of_its_platform(checkout):
    result, wheel = build(checkout, "on")
    assert result.returncode == 0, result.stderr
    assert "-py3-none-linux_" in wheel.name
    assert {"memo_solver/_search.so", "memo_runtime/native/_core.so"} <= contents(wheel)


def test_without_a_compiler_auto_installs_pure_python_and_says_so(checkout, tmp_path):
    result, wheel = build(checkout, "auto", path=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "installing pure Python, without the native parts: no C++ compiler found" in result.stderr


def test_without_a_compiler_on_fails_loudly(checkout, tmp_path):
    result, wheel = build(checkout, "on", path=str(tmp_path))
    assert result.returncode != 0
    assert wheel is None
    assert "MEMO_BUILD_EXT=on, but the native parts cannot be built" in result.stderr


@needs_compiler
@pytest.mark.parametrize(("mode", "code"), [("auto", 0), ("on", 1)])
def test_sources_that_do_not_compile(checkout, mode, code):
    for library in ("solver", "core"):
        replace_sources(checkout, library, BROKEN)
    result, wheel = build(checkout, mode)
    assert bool(result.returncode) == bool(code)
    assert "the compiler failed" in result.stderr
    assert (wheel is None) == bool(code)


@needs_compiler
def test_one_library_that_does_not_compile_leaves_the_other(checkout):
    replace_sources(checkout, "core", BROKEN)
    replace_sources(checkout, "solver", WORKS)
    result, wheel = build(checkout, "auto")
    assert result.returncode == 0, result.stderr
    assert "without memo_runtime.native._core: the compiler failed" in result.stderr
    names = contents(wheel)
    assert "memo_solver/_search.so" in names
    assert "memo_runtime/native/_core.so" not in names


def test_an_unknown_mode_is_refused(checkout):
    result, _ = build(checkout, "perhaps")
    assert result.returncode != 0
    assert "MEMO_BUILD_EXT='perhaps' is unknown; there are: auto, on, off" in result.stderr


def test_setup_does_not_import_torch():
    assert "torch" not in (ROOT / "setup.py").read_text().replace("no torch headers", "")
