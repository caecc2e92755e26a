"""Slabs and the pool: exact bytes, slots, and what happens when the system refuses."""

import gc
import random

import pytest
import torch

from memo_runtime.config import OnRefusal
from memo_runtime.errors import CopyUseError, HostLimitError, PinningError
from memo_runtime.native import pool as pool_module
from memo_runtime.native.backend import Backend, TorchBackend
from memo_runtime.native.compiled import CompiledSlab
from memo_runtime.native.limits import Limit
from memo_runtime.native.pool import HostPool
from memo_runtime.native.slab import Offset, no_offset
from memo_runtime.native.twin import TorchSlab

CPU = torch.device("cpu")
MiB = 2**20


@pytest.fixture(params=["native", "torch"])
def make_slab(request):
    """Makes unpinned slabs of either kind."""
    if request.param == "torch":
        return lambda size: TorchSlab(size, pinned=False)
    core = request.getfixturevalue("core")
    return lambda size: CompiledSlab(core, size)


@pytest.mark.parametrize("size", [1, 4095, 4097, 3 * MiB + 17, 5_000_011, 2**24 + 1])
def test_awkward_sizes_are_exact_to_the_page(make_slab, size):
    slab = make_slab(size)
    assert slab.size == slab.memory.numel() == size
    assert size <= slab.mapped < size + 4096
    slab.memory.fill_(7)
    assert slab.memory[-1] == 7


@pytest.mark.parametrize("size", [4097, 3 * MiB + 17, 9 * MiB + 1])
def test_what_is_pinned_is_what_was_asked(rig, size):
    before = rig.fake.registered_bytes()
    slab = rig.slab(size, chunk_bytes=4 * MiB)
    assert slab.pinned
    assert rig.fake.registered_bytes() - before == slab.mapped < size + 4096
    slab.close()
    assert rig.fake.registered_bytes() == before


def test_slots_of_both_are_the_same(core):
    draw = random.Random(3)
    slabs = [CompiledSlab(core, 4000), TorchSlab(4000, pinned=False)]
    taken = []
    for _ in range(600):
        if not taken or draw.random() < 0.5:
            size, alignment = draw.randint(1, 700), draw.choice([1, 8, 64, 512])
            cells = [no_offset(), no_offset()]
            found = [slab.take(size, alignment, cell) for slab, cell in zip(slabs, cells, strict=True)]
            assert found[0] == found[1] == (cells[0].value >= 0)
            assert cells[0].value == cells[1].value
            if found[0]:
                taken.append(cells)
        else:
            for slab, cell in zip(slabs, taken.pop(draw.randrange(len(taken))), strict=True):
                again = Offset(cell.value)
                slab.give(cell)
                assert cell.value == -1
                for empty in (cell, again):
                    with pytest.raises(CopyUseError, match="given back before"):
                        slab.give(empty)
        assert slabs[0].in_use == slabs[1].in_use


def test_a_freed_slab_takes_nothing_and_stays_readable(make_slab):
    slab = make_slab(4096)
    slab.memory.fill_(3)
    memory = slab.memory
    slab.close()
    slab.close()
    with pytest.raises(CopyUseError, match="freed"):
        slab.take(8, 8, no_offset())
    del slab
    gc.collect()
    assert memory.sum() == 3 * 4096


@pytest.mark.parametrize("wrong", [(0, 8), (8, 0)])
def test_an_empty_slot_is_refused(make_slab, wrong):
    slab = make_slab(4096)
    with pytest.raises(CopyUseError, match="0"):
        slab.take(*wrong, no_offset())


def test_a_refusal_leaves_nothing_or_what_there_was(rig):
    before = rig.fake.registered_bytes()
    rig.fake.register_limit(before + 5 * MiB)
    with pytest.raises(PinningError, match=r"OUT_OF_MEMORY \(asked for 8388608 bytes, refused after 4194304"):
        rig.slab(8 * MiB, chunk_bytes=2 * MiB)
    assert rig.fake.registered_bytes() == before
    slab = rig.slab(8 * MiB, chunk_bytes=2 * MiB, allow_partial=True)
    assert slab.size == slab.mapped == 4 * MiB
    assert "CUDA_ERROR_OUT_OF_MEMORY" in slab.refusal
    x = rig.fake.tensor(4 * MiB)
    rig.fill(x, 9)
    rig.engine.to_host(x, slab.memory).wait()
    rig.synchronize()
    assert slab.memory.min() == 9
    slab.close()


def test_more_than_an_address_space_is_refused(make_slab):
    with pytest.raises(PinningError, match=r"map|address"):
        make_slab(2**62)


class RigBackend(Backend):
    """Slabs on the imitated driver."""

    name = "rig"

    def __init__(self, rig):
        super().__init__(torch.device("cuda", 0))
        self.rig = rig

    def slab(self, size_bytes, *, allow_partial=False):
        return self.rig.slab(size_bytes, chunk_bytes=2 * MiB, allow_partial=allow_partial)

    def engine(self):
        return self.rig.engine


def test_a_pool_gives_slots_and_takes_them_back():
    pool = HostPool(10_000, TorchBackend(CPU))
    pool.reserve(6000)
    assert pool.reserved == 6016
    one, two = pool.take(3000), pool.take(2000)
    assert one.typed(torch.float32).shape == (750,)
    assert pool.in_use == one.size + two.size == 3008 + 2048
    assert pool.reserved == 6016
    with pytest.raises(HostLimitError, match=r"host_budget of at least 10\.81 KiB"):
        pool.take(5000)
    three = pool.take(3000)
    assert pool.reserved == 6016 + 3008
    del one, two, three
    assert pool.in_use == 0
    pool.trim()
    assert pool.reserved == 0


def test_a_pool_that_is_to_stop_says_size_limit_and_knob(rig):
    rig.fake.register_limit(rig.fake.registered_bytes() + 5 * MiB)
    pool = HostPool(100 * MiB, RigBackend(rig))
    with pytest.raises(PinningError, match=r"8\.00 MiB .*CUDA_ERROR_OUT_OF_MEMORY.*host_budget, 100\.00 MiB") as caught:
        pool.reserve(8 * MiB)
    assert pool.reserved == 0
    assert caught.value.granted is None
    assert issubclass(PinningError, HostLimitError)


def test_a_pool_that_is_to_go_on_keeps_what_there_is(rig):
    rig.fake.register_limit(rig.fake.registered_bytes() + 5 * MiB)
    pool = HostPool(100 * MiB, RigBackend(rig), on_refusal=OnRefusal.GO_ON)
    said = r"8\.00 MiB .* within host_budget, 100\.00 MiB, and the system gives 4\.00 MiB: .*CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(PinningError, match=said) as caught:
        pool.reserve(8 * MiB)
    assert (caught.value.granted, pool.reserved, pool.limit, pool.pinned) == (4 * MiB,) * 4
    pool.reserve(4 * MiB)
    slot = pool.take(4 * MiB)
    with pytest.raises(HostLimitError):
        pool.take(64)
    del slot
    pool.trim()


@pytest.mark.parametrize("how", list(OnRefusal))
def test_a_cgroup_is_asked_before_the_kernel_answers(rig, monkeypatch, how):
    """The kernel would end the process instead of refusing."""
    limit = Limit(free=3 * MiB + 5, total=64 * MiB, source="cgroup v2 memory.max")
    monkeypatch.setattr(pool_module, "cgroup_limit", lambda: limit)
    pool = HostPool(100 * MiB, RigBackend(rig), on_refusal=how)
    with pytest.raises(PinningError, match=r"3\.00 MiB of 64\.00 MiB are left by cgroup v2 memory\.max") as caught:
        pool.reserve(8 * MiB)
    if how is OnRefusal.STOP:
        assert pool.reserved == 0
    else:
        assert pool.reserved == pool.limit == caught.value.granted == 3 * MiB
    pool.trim()


def test_a_pool_that_gets_nothing_at_all_goes_on_with_nothing(rig):
    rig.fake.register_limit(0)
    pool = HostPool(100 * MiB, RigBackend(rig), on_refusal=OnRefusal.GO_ON)
    with pytest.raises(PinningError, match="the system gives 0 B"):
        pool.reserve(8 * MiB)
    assert (pool.reserved, pool.limit) == (0, 0)
    with pytest.raises(HostLimitError):
        pool.take(64)
