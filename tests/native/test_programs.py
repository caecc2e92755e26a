"""Native threads, the native CUDA path on an imitated driver, and the twin leave the same bytes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from memo_runtime.native.compiled import CompiledEngine, CompiledSlab
from memo_runtime.native.slab import no_offset
from memo_runtime.native.twin import TorchEngine, TorchSlab
from tests.native.programs import SLOT_BYTES, SLOTS, Machine, programs, start_values

CPU = torch.device("cpu")


def plain_fill(tensor, value):
    tensor.view(torch.uint8).fill_(value)


def slots_of(slab):
    offsets = [no_offset() for _ in range(SLOTS)]
    assert all(slab.take(SLOT_BYTES, 64, offset) for offset in offsets)
    slab.memory.zero_()
    return [slab.memory[offset.value : offset.value + SLOT_BYTES] for offset in offsets]


def outcome(machine):
    return [tensor.clone() for tensor in (*machine.tensors, *machine.slots)]


@pytest.fixture(scope="module")
def threads(core):
    """Both ways of the engine of threads, and a slab."""
    return [CompiledEngine(core, CPU, threads=3, at_once=at_once) for at_once in (False, True)]


def packed(shape, dtype):
    return torch.empty(shape, dtype=dtype)


def expected(program):
    slab = TorchSlab(SLOTS * SLOT_BYTES, pinned=False)
    machine = Machine(TorchEngine(CPU), start_values(packed), slots_of(slab), plain_fill)
    machine.run(program)
    return outcome(machine)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@settings(max_examples=120, deadline=None)
@given(program=programs())
def test_threads_and_twin_agree(core, threads, program):
    wanted = expected(program)
    for engine in threads:
        slab = CompiledSlab(core, SLOTS * SLOT_BYTES)
        machine = Machine(engine, start_values(packed), slots_of(slab), plain_fill)
        machine.run(program)
        assert engine.open_copies == 0
        assert same(outcome(machine), wanted)
        slab.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=programs())
def test_the_cuda_path_and_the_twin_agree(rig, program):
    """Slots cross the borders of registrations, and every copy and kernel takes its time."""
    rig.fake.delay(60)
    slab = rig.slab(2 * 2**21 + SLOTS * SLOT_BYTES, chunk_bytes=2**21)
    slab.take(2**21 - SLOT_BYTES // 2 - 32, 64, no_offset())
    memory = []

    def on_card(shape, dtype):
        count = torch.Size(shape).numel() * dtype.itemsize
        memory.append(rig.fake.tensor(count))
        return memory[-1].view(dtype).view(shape)

    machine = Machine(rig.engine, start_values(on_card), slots_of(slab), rig.fill)
    machine.run(program)
    rig.synchronize()
    assert rig.engine.open_copies == 0
    assert same(outcome(machine), expected(program))
    slab.close()
    for tensor in memory:
        rig.fake.free(tensor.data_ptr())
