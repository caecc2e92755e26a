"""Copies and compute on an imitated driver: who waits for whom, and that each of these waits is needed."""

import gc
import time

import pytest
import torch

from memo_runtime.errors import CopyError, CopyUseError
from tests.native.conftest import Rig

SIZE = 8192


def steps(rig, count):
    """Steps as replay makes them, with everything that is freed poisoned; how many saw wrong bytes.

    The four waits of a step, in this order: the copy out for its source, compute for the copy out, the copy in for its
    target and for the host bytes, compute for the copy in.
    """
    rig.fake.delay(400)
    slab = rig.slab(SIZE)
    x, y = rig.fake.tensor(SIZE), rig.fake.tensor(SIZE)
    seen = []
    for step in range(count):
        value = 1 + step % 200
        rig.fill(x, value)
        out = rig.engine.to_host(x, slab.memory, name=f"step {step}")
        out.wait()
        rig.fill(x, 255)
        back = rig.engine.to_device(slab.memory, y, name=f"step {step}")
        back.wait()
        seen.append((value, rig.snapshot(y)))
        rig.fill(y, 254)
    rig.synchronize()
    rig.engine.drain()
    slab.close()
    return sum(not bool((bytes_ == value).all()) for value, bytes_ in seen)


def test_two_hundred_steps_with_random_delays(rig):
    assert steps(rig, 200) == 0


@pytest.mark.parametrize("left_out", [1, 2, 3, 4])
def test_without_any_one_wait_bytes_are_wrong(rig, left_out):
    rig.fake.skip_wait(left_out, 4)
    assert steps(rig, 40) > 0


def test_nothing_waits_on_the_host(rig):
    slab, x = rig.slab(SIZE), rig.fake.tensor(SIZE)
    rig.fake.sleep(rig.compute, 400_000)
    start = time.perf_counter()
    out = rig.engine.to_host(x, slab.memory)
    assert not out.done()
    out.wait()
    rig.engine.to_device(slab.memory, x).wait()
    assert time.perf_counter() - start < 0.2
    rig.synchronize()


def test_done_says_when_a_copy_is_made(rig):
    slab, x = rig.slab(SIZE), rig.fake.tensor(SIZE)
    ticket = rig.engine.to_host(x, slab.memory)
    rig.engine.drain()
    assert ticket.done()
    ticket.wait()
    assert ticket.done()


def test_events_are_used_again(rig):
    slab, x = rig.slab(SIZE), rig.fake.tensor(SIZE)
    rig.engine.to_host(x, slab.memory).wait()
    before = rig.fake.live()
    for _ in range(300):
        rig.engine.to_host(x, slab.memory).wait()
    assert rig.fake.live() == before
    rig.engine.drain()


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_failed_copy_surfaces_at_its_wait_by_name_and_the_next_step_works(rig, which):
    slab = rig.slab(3 * SIZE)
    parts = slab.memory.view(3, SIZE)
    tensors = [rig.fake.tensor(SIZE) for _ in range(3)]
    rig.fake.fail_copy(which)
    ticket = rig.engine.many_to_host(zip(tensors, parts, strict=True), name="layers.7 attention output")
    with pytest.raises(CopyError, match=r"copying 'layers\.7 attention output' to the host failed: CUDA_ERROR_ILLEGAL"):
        ticket.wait()
    assert ticket.release() is True
    for step in range(3):
        for index, tensor in enumerate(tensors):
            rig.fill(tensor, 10 * step + index)
        rig.engine.many_to_host(zip(tensors, parts, strict=True), name="next").wait()
        rig.synchronize()
        assert parts[:, 0].tolist() == [10 * step, 10 * step + 1, 10 * step + 2]


def test_a_failed_copy_that_nobody_wants_is_no_error(rig):
    slab, x = rig.slab(SIZE), rig.fake.tensor(SIZE)
    rig.fake.fail_copy(1)
    assert rig.engine.to_host(x, slab.memory, name="gone").cancel() is False
    assert rig.engine.open_copies == 0


def test_a_dropped_ticket_orders_compute_behind_its_copy(rig):
    """The memory may be used again by whoever dropped it: an abandoned step."""
    rig.fake.delay(400)
    slab, x = rig.slab(SIZE), rig.fake.tensor(SIZE)
    for step in range(30):
        rig.fill(x, step)
        ticket = rig.engine.to_host(x, slab.memory)
        del ticket
        assert rig.engine.open_copies == 0
        rig.fill(x, 255)
        rig.synchronize()
        assert slab.memory.unique().tolist() == [step]


def test_a_source_that_is_modified_under_its_copy_is_told(rig):
    slab, x = rig.slab(SIZE), rig.fake.tensor(SIZE)
    ticket = rig.engine.to_host(x, slab.memory)
    assert ticket.release() is True
    ticket = rig.engine.to_host(x, slab.memory)
    x.add_(1)
    assert ticket.release() is False
    rig.engine.drain()


def test_memory_that_the_driver_does_not_know_is_an_error_at_the_wait(rig):
    slab = rig.slab(SIZE)
    ticket = rig.engine.to_host(torch.zeros(SIZE, dtype=torch.uint8), slab.memory, name="layers.1")
    with pytest.raises(CopyError, match=r"'layers\.1' to the host failed: CUDA_ERROR_INVALID_VALUE"):
        ticket.wait()
    with pytest.raises(CopyUseError, match="the tensor is on meta, and this engine copies for cpu"):
        rig.engine.to_host(torch.zeros(SIZE, dtype=torch.uint8, device="meta"), slab.memory)
    assert rig.engine.open_copies == 0


def test_rows_are_one_call_and_borders_of_registrations_are_not_crossed(rig):
    border = 2**21
    slab = rig.slab(2 * border, chunk_bytes=border)
    assert rig.fake.num_registrations() == 2
    x = rig.fake.tensor(16 * 1000)
    x.copy_(torch.arange(16 * 1000) % 251)
    rows = x.view(16, 10, 100)[:, 2:9]
    before = rig.fake.copies_2d()
    host = slab.memory[64 : 64 + rows.numel()].view(rows.shape)
    rig.engine.to_host(rows, host).wait()
    assert rig.fake.copies_2d() == before + 1
    crossing = slab.memory[border - 3333 : border - 3333 + rows.numel()].view(rows.shape)
    rig.engine.to_host(rows, crossing).wait()
    rig.synchronize()
    assert torch.equal(host, rows)
    assert torch.equal(crossing, rows)
    slab.close()


def test_everything_is_given_back(core, fake):
    gc.collect()
    before, pinned = fake.live(), fake.registered_bytes()
    rig = Rig(core, fake)
    slab, x = rig.slab(SIZE), rig.fake.tensor(SIZE)
    ticket = rig.engine.to_host(x, slab.memory)
    memory = slab.memory
    rig.engine.close()
    with pytest.raises(CopyUseError, match="closed"):
        rig.engine.to_host(x, memory)
    with pytest.raises(CopyUseError, match="freed"):
        ticket.wait()
    slab.close()
    assert fake.registered_bytes() == pinned
    assert memory.sum() == 0  # still there to read
    fake.stream_end(rig.compute)
    del slab, memory, ticket, rig
    gc.collect()
    assert fake.live() == before
