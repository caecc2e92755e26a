"""The core, built where it is not installed, and a CUDA driver without a GPU."""

from __future__ import annotations

import ctypes

import pytest
import torch

from memo_runtime.native.compiled import Card, CompiledEngine, CompiledSlab
from memo_runtime.native.library import Library
from tests.native.building import compiler, core_library, fake_driver

MiB = 2**20


@pytest.fixture(scope="session")
def core(tmp_path_factory):
    """The loaded core."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    return Library(core_library(tmp_path_factory.mktemp("core")))


class FakeCuda:
    """The imitated driver, as ctypes functions; device memory as tensors."""

    def __init__(self, path) -> None:
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)
        u64, pointer, i32 = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int
        for name, result, arguments in (
            ("alloc", u64, (u64, i32)),
            ("free", None, (u64,)),
            ("stream", pointer, ()),
            ("stream_end", None, (pointer,)),
            ("synchronize", None, (pointer,)),
            ("fill", None, (pointer, u64, i32, u64)),
            ("read", None, (pointer, u64, u64, u64)),
            ("sleep", None, (pointer, i32)),
            ("delay", None, (i32,)),
            ("fail_copy", None, (i32,)),
            ("skip_wait", None, (i32, i32)),
            ("register_limit", None, (u64,)),
            ("registered_bytes", u64, ()),
            ("num_registrations", i32, ()),
            ("copies", i32, ()),
            ("copies_2d", i32, ()),
            ("live", i32, ()),
        ):
            function = getattr(self.library, f"fake_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def tensor(self, size: int, device: int = 0) -> torch.Tensor:
        """``size`` bytes of memory of ``device``; never freed."""
        return torch.frombuffer((ctypes.c_uint8 * size).from_address(self.alloc(size, device)), dtype=torch.uint8)


@pytest.fixture(scope="session")
def fake_path(tmp_path_factory):
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    return fake_driver(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def fake(fake_path):
    """The imitated driver, with nothing slow, failing or refused afterwards."""
    driver = FakeCuda(fake_path)
    yield driver
    driver.delay(0)
    driver.fail_copy(0)
    driver.skip_wait(0, 1)
    driver.register_limit(2**64 - 1)


class Rig:
    """An engine on the imitated driver, with a compute stream."""

    def __init__(self, core, fake) -> None:
        self.core, self.fake = core, fake
        self.card = Card(core, 0, fake.path)
        self.compute = fake.stream()
        self.engine = CompiledEngine(core, torch.device("cpu"), card=self.card, stream=lambda: self.compute)

    def slab(self, size: int, **options) -> CompiledSlab:
        return CompiledSlab(self.core, size, card=self.card, threads=2, **options)

    def fill(self, tensor: torch.Tensor, value: int) -> None:
        """A kernel on the compute stream; ``tensor`` is contiguous."""
        self.fake.fill(self.compute, tensor.data_ptr(), value, tensor.numel() * tensor.element_size())

    def snapshot(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the compute stream will see in contiguous ``tensor`` at this point."""
        into = torch.empty_like(tensor)
        self.fake.read(self.compute, tensor.data_ptr(), into.data_ptr(), tensor.numel() * tensor.element_size())
        return into

    def synchronize(self) -> None:
        self.fake.synchronize(self.compute)


@pytest.fixture
def rig(core, fake):
    one = Rig(core, fake)
    yield one
    one.engine.close()
    one.synchronize()
    fake.stream_end(one.compute)
