"""Slabs, engines and drivers where processes fork, end, or start with a broken driver."""

import gc
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from memo_runtime.errors import CopyUseError, NativeUnavailableError, PinningError
from memo_runtime.native.compiled import Card, CompiledEngine, CompiledSlab
from tests.house.sources import ROOT
from tests.native.building import core_library
from tests.short_memory import little_memory


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_gives_nothing_back_that_is_its_parents(rig):
    """Data loaders fork: a child that ends must not unpin its parent's memory, or wait for threads it has not."""
    slab, x = rig.slab(8192), rig.fake.tensor(8192)
    before = rig.fake.registered_bytes()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)  # what waits for ever must not outlive the test
        status = 1
        try:
            rig.engine.__del__()
            slab.memory = None
            del slab
            gc.collect()
            status = int(rig.fake.registered_bytes() != before)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    rig.fill(x, 5)
    rig.engine.to_host(x, slab.memory).wait()
    rig.synchronize()
    assert slab.memory.min() == 5
    slab.close()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_is_told_that_copies_are_not_its_own(rig):
    """Threads are not forked: it would wait for ever, from the backward of a forward that its parent has made."""
    slab, x = rig.slab(4096), rig.fake.tensor(4096)
    ticket = rig.engine.to_host(x, slab.memory)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        refused = 0
        try:
            for use in (ticket.wait, lambda: rig.engine.to_host(x, slab.memory)):
                try:
                    use()
                except CopyUseError as error:
                    refused += "forked in the middle of a step" in str(error)
        finally:
            os._exit(2 - refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ticket.wait()
    slab.close()


def test_a_tensor_without_memory_is_refused(core):
    engine = CompiledEngine(core, torch.device("cpu"))
    slab = CompiledSlab(core, 4096)
    zeros = torch._efficientzerotensor(4096, dtype=torch.uint8)
    with pytest.raises(CopyUseError, match="without memory"):
        engine.to_host(zeros, slab.memory)
    engine.close()
    slab.close()


def test_a_process_may_end_with_copies_under_way(core, fake_path, tmp_path):
    script = (
        "import sys; sys.path[:0] = ['.', 'solver']\n"
        "import torch; from pathlib import Path\n"
        "from memo_runtime.native.library import Library\n"
        "from memo_runtime.native.compiled import Card, CompiledEngine, CompiledSlab\n"
        f"core = Library(Path({str(core_library(tmp_path))!r}))\n"
        "engine = CompiledEngine(core, torch.device('cpu'), threads=2)\n"
        "slab = CompiledSlab(core, 1 << 26)\n"
        "ticket = engine.to_device(slab.memory, torch.empty(1 << 26, dtype=torch.uint8))\n"
        f"card = Card(core, 0, {str(fake_path)!r})\n"
        "pinned = CompiledSlab(core, 1 << 20, card=card, threads=1)\n"
        "other = CompiledEngine(core, torch.device('cpu'), card=card)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_driver_that_does_not_start_says_so(core, fake_path, tmp_path, monkeypatch):
    broken = tmp_path / "libbroken.so"
    shutil.copy(fake_path, broken)
    monkeypatch.setenv("FAKE_CUDA_BROKEN", "1")
    with pytest.raises(NativeUnavailableError, match="the CUDA driver does not start: CUDA_ERROR_UNKNOWN"):
        Card(core, 0, str(broken))
    monkeypatch.delenv("FAKE_CUDA_BROKEN")
    assert Card(core, 0, str(broken)).handle > 0


def test_a_library_that_is_no_driver_says_what_it_lacks(core):
    with pytest.raises(NativeUnavailableError, match="has no function cuInit"):
        Card(core, 0, core_library_path(core))


def core_library_path(core):
    """The core's own file: a library without a driver's functions."""
    return core._handle._name


def test_tensors_outlive_their_engine_and_slab(rig):
    slab = rig.slab(4096)
    memory = slab.memory[:100]
    memory.fill_(8)
    slab.close()
    del slab
    gc.collect()
    assert torch.equal(memory, torch.full((100,), 8, dtype=torch.uint8))


def test_threads_that_do_not_start_are_refused_and_those_that_did_are_joined(core):
    """A started thread that nobody joined would end the process."""
    with little_memory(24 << 20), pytest.raises(PinningError, match="the system starts no thread: no memory"):
        CompiledEngine(core, torch.device("cpu"), threads=256)
    engine = CompiledEngine(core, torch.device("cpu"), threads=2)
    slab = CompiledSlab(core, 64)
    slab.memory.zero_()
    engine.to_host(torch.full((64,), 7, dtype=torch.uint8), slab.memory).wait()
    assert slab.memory.min() == 7
