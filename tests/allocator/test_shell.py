"""The shell: it compiles against the headers of the torch that is installed, and what cannot be built says so.

The CPU's wheel of torch lacks one generated header, which says that libraries are shared; the CUDA runtime's headers
come from a toolkit or from Triton. So types and signatures are checked here, and nothing can be loaded.
"""

import re

import pytest
import torch

from memo_runtime.allocator import building, library, versions
from memo_runtime.errors import AllocatorUnavailableError
from tests.allocator.building import SOURCES, compile_unit, cuda_headers
from tests.native.building import compiler


@pytest.mark.skipif(versions.running() not in versions.KNOWN, reason="the allocator does not know this torch")
def test_the_shell_compiles_against_the_installed_torch(tmp_path):
    headers = cuda_headers()
    if compiler() is None or headers is None:
        pytest.skip("needs a C++ compiler and the headers of a CUDA runtime")
    stub = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    stub.parent.mkdir(parents=True)
    stub.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    torch_headers = building.Path(torch.__file__).parent / "include"
    flags = [f"-I{SOURCES / 'shell'}", "-isystem", str(torch_headers), "-isystem", str(headers), f"-I{tmp_path}",
             f"-std={versions.standard(versions.running())}"]  # fmt: skip
    done = compile_unit([*SOURCES.glob("*.cpp"), *(SOURCES / "shell").glob("*.cpp")], None, *flags)
    assert done.returncode == 0, done.stderr[-6000:]


def test_every_virtual_function_of_torch_is_overridden():
    """One that torch has a default for compiles without, and would do less than the native allocator's."""
    headers = building.Path(torch.__file__).parent / "include" / "c10"
    asked = set[str]()
    for file, begin in (("core/Allocator.h", "struct C10_API Allocator {"),
                        ("core/CachingDeviceAllocator.h", "struct C10_API DeviceAllocator :"),
                        ("cuda/CUDACachingAllocator.h", "class CUDAAllocator :")):  # fmt: skip
        _, _, rest = (headers / file).read_text().partition(begin)
        asked |= set(re.findall(r"\bvirtual\s[^;{(~]*?(\w+)\(", rest.partition("\n};")[0]))
    assert {"allocate", "emptyCache", "raw_alloc"} <= asked
    own = "".join((SOURCES / "shell" / name).read_text() for name in ("allocator.hpp", "delegated.inc"))
    overridden = {name for name in asked if re.search(rf"\b{name}\([^;{{]*\boverride\b", own)}
    assert asked - overridden == {"is_simple_data_ptr"}  # looks at the tensor alone


def test_every_function_of_the_interface_is_called_from_python():
    text = (SOURCES / "shell" / "interface.h").read_text()
    declared = {word.partition("(")[0] for word in text.split() if word.startswith("memo_alloc_") and "(" in word}
    assert declared == {f"memo_alloc_{name}" for name in library._SIGNATURES}
    assert f"INTERFACE_VERSION {library.INTERFACE_VERSION}\n" in text


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_a_torch_without_cuda_says_so(capsys, monkeypatch):
    with pytest.raises(AllocatorUnavailableError, match="built without CUDA"):
        building.build()
    from memo_runtime.allocator.__main__ import main

    assert main() == 1
    assert "built without CUDA" in capsys.readouterr().err


def test_another_minor_is_refused_with_what_is_known(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.1+cu999")
    monkeypatch.setattr(torch.version, "cuda", "99.9")
    with pytest.raises(AllocatorUnavailableError, match=r"torch 2\.99 is running.* 2\.11, 2\.12, 2\.13, 2\.14"):
        building.build()
    library._load.cache_clear()
    try:
        with pytest.raises(AllocatorUnavailableError, match=r"cannot be used: torch 2\.99 is running"):
            library.planned_allocator()
        assert not library.allocator_status().available
    finally:
        library._load.cache_clear()


LIBRARY = """
#include <cstdint>
#define F(name, ...) extern "C" int memo_alloc_##name(__VA_ARGS__) { return 0; }
extern "C" int memo_alloc_torch() { return TORCH; }
extern "C" int memo_alloc_interface_version() { return VERSION; }
F(error) F(install) F(arm) F(disarm) F(begin_step) F(end_step) F(statistics) F(misfits) F(holds)
"""


@pytest.mark.parametrize(
    ("torch_number", "version", "says"),
    [
        (2008, library.INTERFACE_VERSION, r"built for torch 2\.8, and .* is running: run python -m memo_runtime"),
        (versions.number(versions.running()), 99, r"has interface 99, this version needs 3: run python -m"),
    ],
)
def test_a_library_for_something_else_is_refused(tmp_path, torch_number, version, says):
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    source, target = tmp_path / "other.hpp", tmp_path / "other.so"
    source.write_text(LIBRARY.replace("TORCH", str(torch_number)).replace("VERSION", str(version)))
    assert compile_unit([source], target, "-shared", "-fPIC").returncode == 0
    with pytest.raises(AllocatorUnavailableError, match=says):
        library.PlannedAllocator(target)


def test_a_library_that_is_none_is_refused(tmp_path):
    with pytest.raises(AllocatorUnavailableError, match=r"not built for torch .*: run python -m memo_runtime"):
        library.PlannedAllocator(tmp_path / "nothing.so")
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    with pytest.raises(AllocatorUnavailableError, match="cannot be loaded, build it again"):
        library.PlannedAllocator(broken)


def test_numbers_of_versions():
    assert [versions.number(minor) for minor in versions.KNOWN] == [2011, 2012, 2013, 2014]
    assert [versions.standard(minor) for minor in versions.KNOWN] == ["c++17", "c++17", "c++17", "c++20"]
