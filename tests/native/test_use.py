"""Wrong use of either engine on CPU is an exception and starts nothing; modes choose who copies."""

import logging
import subprocess
import sys

import pytest
import torch

from memo_runtime.config import native_mode
from memo_runtime.errors import ArgumentError, CopyUseError, NativeUnavailableError
from memo_runtime.native import backend as backend_module
from memo_runtime.native import library as library_module
from memo_runtime.native import limits
from memo_runtime.native.backend import CompiledBackend, TorchBackend, choose_backend
from memo_runtime.native.compiled import Card, CompiledEngine
from memo_runtime.native.library import Library
from memo_runtime.native.runs import matched, runs_of, six_numbers
from tests.house.sources import ROOT
from tests.native.building import compile_together, compiler

CPU = torch.device("cpu")


@pytest.fixture(params=["native", "native, asynchronous", "torch"])
def backend(request):
    """Both backends; the native engine also as replay does not use it on CPU."""
    if request.param == "torch":
        return TorchBackend(CPU)
    core = request.getfixturevalue("core")
    made = CompiledBackend(CPU, core=core)
    if request.param != "native":
        made.engine = lambda: CompiledEngine(core, CPU, threads=2)
    return made


@pytest.fixture
def place(backend):
    """An engine, a slab and its memory as floats."""
    slab = backend.slab(4096)
    return backend.engine(), slab, slab.memory.view(torch.float32)


def test_a_view_that_means_something_else_than_its_memory_is_refused(backend):
    engine, slab = backend.engine(), backend.slab(4096)
    host = slab.memory.view(torch.complex64)[:4]
    x = torch.randn(4, dtype=torch.complex64)
    for lazy in (x.conj(), x.conj().imag):
        target = slab.memory.view(lazy.dtype)[:4]
        with pytest.raises(CopyUseError, match="resolve_conj"):
            engine.to_host(lazy, target)
        with pytest.raises(CopyUseError, match="resolve_conj"):
            engine.many_to_host([(lazy, target)])
    engine.to_host(x.conj().resolve_conj(), host).wait()
    assert torch.equal(host, x.conj())
    assert engine.open_copies == 0


def test_copies_there_and_back(place):
    engine, _, host = place
    x = torch.randn(3, 7, 5)
    rows, kept = x[:, 2:6], host[:60].view(3, 4, 5)
    out = engine.to_host(rows, kept, name="x")
    out.wait()
    assert torch.equal(kept, rows)
    back = torch.zeros(3, 7, 5)
    ticket = engine.to_device(kept, back[:, 1:5])
    assert ticket.release() is True
    assert torch.equal(back[:, 1:5], rows)
    assert back[:, 0].abs().sum() == back[:, 5:].abs().sum() == 0
    engine.many_to_host([(torch.ones(4), host[:4]), (torch.ones(2, 2), host[4:8].view(2, 2))]).wait()
    assert host[:8].tolist() == [1.0] * 8
    assert engine.open_copies == 0


def test_a_ticket_serves_once(place):
    engine, _, host = place
    ticket = engine.to_host(torch.ones(4), host[:4], name="layers.3")
    ticket.wait()
    assert ticket.release() is True
    for again in (ticket.wait, ticket.cancel):
        with pytest.raises(CopyUseError, match=r"the copy of 'layers\.3' was waited for or cancelled before"):
            again()


def test_a_copy_to_the_device_can_be_cancelled(place):
    engine, _, host = place
    for _ in range(20):
        ticket = engine.to_device(host[:1000], torch.empty(1000))
        ticket.cancel()
    del ticket
    engine.to_device(host[:8], torch.empty(8))  # dropped at once
    engine.drain()
    assert engine.open_copies == 0


def test_nothing_to_copy_is_a_copy(place):
    engine, _, host = place
    engine.to_host(torch.empty(0, 4), host[:0].view(0, 4)).wait()
    engine.many_to_device([]).wait()


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (torch.ones(4), slice(0, 5), "both ends of a copy have one shape"),
        (torch.ones(4, dtype=torch.float64), slice(0, 4), "both ends of a copy have one shape and dtype"),
        (torch.ones(4, 6).t(), slice(0, 24), "not a number of equal runs"),
        (torch.ones(1).expand(4), slice(0, 4), "not a number of equal runs"),
        (torch.ones(4, device="meta"), slice(0, 4), "the tensor is on meta, and this engine copies for cpu"),
    ],
)
def test_what_makes_no_sense_is_refused(place, source, target, message):
    engine, _, host = place
    with pytest.raises(CopyUseError, match=message):
        engine.to_host(source, host[target].view(source.shape) if target.stop == source.numel() else host[target])
    assert engine.open_copies == 0


def test_memory_of_no_slab_is_refused(place):
    engine, slab, host = place
    with pytest.raises(CopyUseError, match="lies in no slab"):
        engine.to_host(torch.ones(4), torch.empty(4))
    slab.close()
    with pytest.raises(CopyUseError, match="lies in no slab: the slab was freed"):
        engine.to_host(torch.ones(4), host[:4])


def test_a_closed_engine_takes_nothing(place):
    engine, _, host = place
    engine.close()
    engine.close()
    with pytest.raises(CopyUseError, match="closed"):
        engine.to_host(torch.ones(4), host[:4])


@pytest.mark.parametrize(
    "device",
    [
        torch.empty(4, 6, 8),
        torch.empty(4, 6, 8)[:, 1:3],
        torch.empty(1, 6, 8)[:, 1:3],
        torch.empty(6, 8, 4)[:, :, 0:1],
        torch.empty(4, 6, 8, dtype=torch.bfloat16)[2:, :5],
        torch.empty(4, 0, 8),
    ],
)
def test_the_short_way_to_a_copys_numbers_is_the_long_one(device):
    host = torch.empty(device.shape, dtype=device.dtype)
    one, other = matched(host, device)
    found = six_numbers(host, device)
    assert found[:2] == (one.address, other.address)
    assert found[2] * found[3] == one.width * one.height == device.nbytes
    if found[2] and found[3] > 1:
        assert found[2:] == (one.width, one.height, one.pitch, other.pitch)


@pytest.mark.parametrize(
    ("tensor", "runs"),
    [
        (torch.empty(2, 3, 4), (96, 1, 0)),
        (torch.empty(2, 5, 4)[:, 1:4], (48, 2, 80)),
        (torch.empty(1, 5, 4)[:, 1:4], (48, 1, 0)),
        (torch.empty(2, 3, 5, 4)[:, :, 1:2], (16, 6, 80)),
        (torch.empty(6, 1, 4), (96, 1, 0)),
        (torch.empty(4, 8)[:, 3], (4, 4, 32)),
        (torch.empty(3, 0), (0, 0, 0)),
    ],
)
def test_tensors_as_runs(tensor, runs):
    assert tuple(runs_of(tensor))[1:] == runs


# ---- modes


def test_off_is_the_twin_whatever_there_is(monkeypatch):
    monkeypatch.setenv("MEMO_NATIVE", "on")
    assert choose_backend(CPU, "off").name == "torch"


def test_auto_says_why_it_goes_without(monkeypatch, caplog):
    def missing():
        raise NativeUnavailableError("the native core cannot be used: not built")

    monkeypatch.setattr(backend_module, "library", missing)
    monkeypatch.delenv("MEMO_NATIVE", raising=False)
    with caplog.at_level(logging.INFO, logger="memo_runtime"):
        assert choose_backend(CPU).name == "torch"
    assert "copies go through PyTorch: the native core cannot be used: not built" in caplog.text
    with pytest.raises(NativeUnavailableError, match="not built"):
        choose_backend(CPU, "on")
    monkeypatch.setenv("MEMO_NATIVE", "on")
    with pytest.raises(NativeUnavailableError, match="not built"):
        choose_backend(CPU)


def test_auto_is_the_core_where_it_is(monkeypatch, core):
    monkeypatch.setattr(backend_module, "library", lambda: core)
    for mode in ("auto", "on"):
        assert choose_backend(CPU, mode).name == "native"


def test_an_unknown_mode_is_refused():
    with pytest.raises(ArgumentError, match="MEMO_NATIVE='always' is unknown; there are: auto, on, off"):
        native_mode("always")


def test_a_library_that_cannot_be_used_says_why(tmp_path):
    with pytest.raises(NativeUnavailableError, match="not built: install with a C"):
        Library(tmp_path / "none.so")
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    with pytest.raises(NativeUnavailableError, match="cannot be loaded"):
        Library(broken)
    if compiler() is not None:
        messages = {99: "has interface 99, this version needs 3: build it again", 3: "lacks a function, build it again"}
        for version, message in messages.items():
            source = tmp_path / f"source_{version}.cpp"
            source.write_text(f'extern "C" int memo_core_interface_version() {{ return {version}; }}\n')
            target = tmp_path / f"old_{version}.so"
            assert compile_together([source], target, "-shared", "-fPIC").returncode == 0
            with pytest.raises(NativeUnavailableError, match=message):
                Library(target)


def test_no_driver_and_no_such_device(core, fake_path, monkeypatch):
    with pytest.raises(NativeUnavailableError, match="no CUDA driver"):
        Card(core, 0, "libno-such-driver.so.1")
    with pytest.raises(CopyUseError, match="there is no CUDA device 5; the driver has 2"):
        Card(core, 5, str(fake_path))
    assert Card(core, 1, str(fake_path)).numa_node == -1


def test_the_library_loads_without_torch(core):
    code = (
        "import sys; sys.path[:0] = ['.', 'solver']\n"
        "from memo_runtime.native.library import native_status\n"
        "assert native_status().reason; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert library_module.INTERFACE_VERSION == 3


# ---- limits


def test_the_tightest_cgroup_counts(tmp_path, monkeypatch):
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    groups = ((inner, "max", "100"), (tmp_path / "outer", "5000", "4000"), (tmp_path, "9000", "1000"))
    for folder, limit, used in groups:
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    monkeypatch.setattr(limits, "_VERSIONS", ((tmp_path, "memory.max", "memory.current", "v2"),))
    monkeypatch.setattr(limits, "_own_group", lambda root: inner)
    assert limits.cgroup_limit() == limits.Limit(free=1000, total=5000, source="v2")
    (tmp_path / "outer" / "memory.max").write_text("max\n")
    assert limits.cgroup_limit() == limits.Limit(free=8000, total=9000, source="v2")
    (tmp_path / "memory.max").write_text(f"{2**63 - 4096}\n")
    assert limits.cgroup_limit() is None
