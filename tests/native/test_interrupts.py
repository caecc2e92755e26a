"""An interrupt that is raised right behind a call of the core: what the call began or took has an owner already."""

import contextlib
import gc

import pytest
import torch

from memo_runtime.errors import CopyUseError
from memo_runtime.native.backend import Backend
from memo_runtime.native.compiled import CompiledEngine, CompiledSlab
from memo_runtime.native.pool import HostPool
from memo_runtime.native.slab import no_offset
from memo_runtime.native.twin import FreeList

CPU = torch.device("cpu")
MiB = 2**20


@contextlib.contextmanager
def interrupted(core, monkeypatch, name):
    """The next call of ``memo_core_NAME`` is made, and then a signal is handled."""
    with monkeypatch.context() as patch:
        if name in ("submit", "wait"):
            inner = getattr(core, name)

            def call(*arguments):
                inner(*arguments)
                raise KeyboardInterrupt

            patch.setattr(core, name, call)
        else:
            inner = core.call

            def named(which, *arguments):
                inner(which, *arguments)
                if which == name:
                    raise KeyboardInterrupt

            patch.setattr(core, "call", named)
        with pytest.raises(KeyboardInterrupt):
            yield
    gc.collect()


@pytest.mark.parametrize("name", ["submit", "wait"])
def test_threads_have_left_memory_that_was_freed(core, monkeypatch, name):
    """A large tensor that is freed is unmapped at once: a thread that still copied would end the process."""
    engine, slab = CompiledEngine(core, CPU, threads=2, at_once=True), CompiledSlab(core, 64 * MiB)
    for _ in range(5):
        with interrupted(core, monkeypatch, name):
            engine.to_host(torch.ones(64 * MiB, dtype=torch.uint8), slab.memory)
        assert engine.open_copies == 0
    with interrupted(core, monkeypatch, "submit"):
        engine.to_device(slab.memory, torch.empty(64 * MiB, dtype=torch.uint8))
    assert engine.open_copies == 0
    engine.close()


def test_memory_of_a_lost_copy_is_not_written_to_afterwards(rig, core, monkeypatch):
    """What compute does next with that memory comes behind the copy."""
    rig.fake.delay(30_000)
    slab, x = rig.slab(MiB), rig.fake.tensor(MiB)
    slab.memory.fill_(3)
    with interrupted(core, monkeypatch, "submit"):
        rig.engine.to_device(slab.memory, x)
    rig.fill(x, 9)
    assert rig.engine.open_copies == 0
    rig.synchronize()
    rig.fake.delay(0)
    seen = rig.snapshot(x)
    rig.synchronize()
    assert seen.min() == seen.max() == 9


def test_a_ticket_is_released_after_an_interrupt_in_its_wait(rig, core, monkeypatch):
    slab, x = rig.slab(MiB), rig.fake.tensor(MiB)
    rig.fill(x, 4)
    ticket = rig.engine.to_host(x, slab.memory)
    with interrupted(core, monkeypatch, "wait"):
        ticket.release()
    assert ticket.release() is True
    with pytest.raises(CopyUseError, match="a ticket serves once"):
        ticket.wait()
    rig.synchronize()
    assert slab.memory.min() == 4


class CoreBackend(Backend):
    """Plain slabs of a core."""

    name = "core"

    def __init__(self, core):
        super().__init__(CPU)
        self.core = core

    def slab(self, size_bytes, *, allow_partial=False):
        return CompiledSlab(self.core, size_bytes)

    def engine(self):
        raise NotImplementedError


def test_slots_go_back(core, monkeypatch):
    pool = HostPool(8 * MiB, CoreBackend(core))
    pool.reserve(8 * MiB)
    for _ in range(3):
        with interrupted(core, monkeypatch, "slab_take"):
            pool.take(8 * MiB)
        assert pool.in_use == 0
    slot = pool.take(8 * MiB)
    del slot
    with interrupted(core, monkeypatch, "slab_give"):
        assert pool.in_use == 0
    assert pool.in_use == 0
    assert pool.take(8 * MiB).size == 8 * MiB


def test_memory_that_was_being_pinned_goes_back(rig, core, monkeypatch):
    """Pinning takes seconds: a Ctrl-C comes in it before it comes anywhere else."""
    before = rig.fake.registered_bytes()
    with interrupted(core, monkeypatch, "slab_create"):
        rig.slab(8 * MiB)
    assert rig.fake.registered_bytes() == before


def test_the_free_list_takes_the_lowest_place_that_fits():
    free = FreeList(100)
    cells = [no_offset() for _ in range(4)]
    sizes = [(10, 1), (30, 16), (50, 1), (1, 64)]
    assert [free.take(*size, cell) for size, cell in zip(sizes, cells, strict=True)] == [True, True, True, False]
    assert [cell.value for cell in cells] == [0, 16, 46, -1]
    assert free.give(cells[1])
    assert not free.give(cells[1])
    assert free.take(36, 1, cells[3])
    assert cells[3].value == 10
    assert free.in_use == 10 + 36 + 50
