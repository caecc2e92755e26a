"""The planned allocator where things go on beside the plan: threads, devices, plans that change, memory that stays.

Nothing here looks at contents, so it also runs on a CUDA runtime that is imitated (tests/allocator/test_imitated.py).
"""

import gc
import threading

import pytest
import torch

from memo_runtime.arena.compaction import compact
from memo_runtime.arena.steps import SETTLING, PlannedSteps
from memo_runtime.errors import AllocatorPlanError

pytestmark = pytest.mark.gpu
MiB = 1 << 20


def taken(size=MiB, device="cuda:0"):
    return torch.empty(size, dtype=torch.uint8, device=device)


def in_a_row(count, size=MiB, stream=0):
    """Slots that live at once, one behind the other."""
    return [(i, 2 * count, size, i * size, stream) for i in range(count)]


def test_another_thread_may_allocate_and_free(allocator):
    allocator.arm(0, in_a_row(64), 64 * MiB)
    allocator.begin_step(0)
    start, made = torch.cuda.memory_allocated(), [taken() for _ in range(32)]
    threads = [threading.Thread(target=lambda part: part.clear(), args=(made[i::4],)) for i in range(4)]
    more: list[torch.Tensor] = []
    threads += [threading.Thread(target=lambda: more.append(taken())) for _ in range(4)]
    del made
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del threads, thread
    assert all(allocator.holds(0, tensor.data_ptr()) for tensor in more)
    assert len({tensor.data_ptr() for tensor in more}) == 4
    assert torch.cuda.memory_allocated() == start + 4 * MiB
    allocator.end_step(0)


def test_plans_change_while_tensors_live(allocator):
    size = 16 * MiB  # a segment of its own for each arena
    allocator.arm(0, in_a_row(4, size), 4 * size)
    allocator.begin_step(0)
    kept = [taken(size) for _ in range(4)]
    allocator.arm(0, in_a_row(2, 2 * size), 4 * size)  # fits into the arena that is there
    assert allocator.statistics(0).live == 4
    allocator.begin_step(0)
    assert not allocator.holds(0, taken(2 * size).data_ptr())  # its bytes are in use
    del kept[1:]
    second = taken(2 * size)
    assert allocator.holds(0, second.data_ptr())
    allocator.arm(0, in_a_row(2, 8 * size), 16 * size)  # a larger arena beside the old one
    allocator.begin_step(0)
    large = taken(8 * size)
    assert [allocator.holds(0, t.data_ptr()) for t in (kept[0], second, large)] == [True] * 3
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    del kept, second
    gc.collect()
    assert allocator.disarm(0) == 8 * size  # what lives on keeps its arena, the other one goes
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == reserved - 4 * size
    assert allocator.holds(0, large.data_ptr())
    del large


def test_plans_that_cannot_be_are_refused(allocator):
    before = torch.cuda.memory_reserved()
    for slots, says in (
        ([], "places nothing"),
        ([(0, 2, MiB, 0, 0), (1, 3, MiB, 512, 0)], "slot 1 shares bytes with slot 0"),
        ([(0, 1, MiB, 100, 0)], "not a multiple of 512"),
        ([(0, 1, 5 * MiB, 0, 0)], "ends behind the arena"),
    ):
        with pytest.raises(AllocatorPlanError, match=says):
            allocator.arm(0, slots, 4 * MiB)
    with pytest.raises(AllocatorPlanError, match="no device 99"):
        allocator.arm(99, in_a_row(1), MiB)
    assert not allocator.statistics(0).armed
    assert torch.cuda.memory_reserved() == before


def test_storages_are_resized_in_the_arena(allocator):
    allocator.arm(0, [(0, 1, 3 * MiB, 0, 0), (2, 3, 3 * MiB, 0, 0)], 4 * MiB)
    allocator.begin_step(0)
    tensor = taken(3 * MiB)
    first = tensor.data_ptr()
    tensor.untyped_storage().resize_(0)
    assert allocator.statistics(0).live == 0
    tensor.untyped_storage().resize_(3 * MiB)
    assert tensor.data_ptr() == first
    assert allocator.holds(0, first)
    del tensor
    allocator.end_step(0)


def test_noted_streams_are_waited_for(allocator):
    allocator.arm(0, [*in_a_row(1), (3, 4, MiB, 0, 0)], MiB)
    side = torch.cuda.Stream()
    allocator.begin_step(0)
    tensor = taken()
    tensor.record_stream(side)
    tensor.record_stream(side)
    tensor.record_stream(torch.cuda.current_stream())
    del tensor
    before = allocator.statistics(0).total.waits
    again = taken()
    assert allocator.holds(0, again.data_ptr())
    assert allocator.statistics(0).total.waits == before + 1
    del again
    allocator.end_step(0)


def test_outside_of_a_step_everything_is_native(allocator):
    allocator.arm(0, in_a_row(1), MiB)
    assert not allocator.holds(0, taken().data_ptr())
    allocator.begin_step(0)
    planned = taken()
    assert allocator.holds(0, planned.data_ptr())
    allocator.end_step(0)
    assert allocator.holds(0, planned.data_ptr())  # it lives on
    assert not allocator.holds(0, taken().data_ptr())
    torch.cuda.empty_cache()
    assert allocator.holds(0, planned.data_ptr())
    del planned


def test_peaks_begin_anew_and_survive_the_arena(allocator):
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    allocator.arm(0, in_a_row(8), 64 * MiB)
    assert torch.cuda.memory_allocated() == start  # an arena alone is nothing that is in use
    assert torch.cuda.max_memory_allocated() == start
    allocator.begin_step(0)
    kept = [taken() for _ in range(8)]
    del kept[3:]
    assert torch.cuda.max_memory_allocated() == start + 8 * MiB
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == start + 3 * MiB
    torch.cuda.reset_accumulated_memory_stats()
    assert torch.cuda.memory_stats()["allocated_bytes.all.allocated"] == 0
    kept.clear()
    allocator.disarm(0)
    assert torch.cuda.memory_stats()["allocated_bytes.all.freed"] == 3 * MiB
    assert torch.cuda.memory_allocated() == start
    assert torch.cuda.max_memory_allocated() == start + 3 * MiB


def test_devices_have_arenas_of_their_own(allocator):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    for device in (0, 1):
        allocator.arm(device, in_a_row(2), 2 * MiB)
        allocator.begin_step(device)
    one, two = taken(), taken(device="cuda:1")
    assert (allocator.holds(0, one.data_ptr()), allocator.holds(1, two.data_ptr())) == (True, True)
    assert not allocator.holds(1, one.data_ptr())
    with torch.cuda.device(1):
        del one  # freed while another device is the current one
    assert (allocator.statistics(0).live, allocator.statistics(1).live) == (0, 1)
    assert torch.cuda.memory_allocated(1) == MiB
    del two
    assert allocator.disarm(1) == 0


def test_steps_are_recorded_placed_and_served_by_themselves(allocator):
    notes: list[str] = []
    steps = PlannedSteps(allocator, 0, notes.append)
    weight = torch.zeros(1000, 1000, device="cuda", requires_grad=True)

    def step(rows):
        weight.grad = None
        steps.begin(rows)
        x = torch.zeros(rows, 1000, device="cuda")
        for _ in range(5):
            x = (x + weight[:1]).relu() * 2
        x.sum().backward()

    for rows in (500, 900):
        for _ in range(SETTLING + 2):
            step(rows)
        steps._solving.solving._process.wait()
        for _ in range(3):
            step(rows)
        steps.end()
        found = steps.report()
        assert found.state == "planned", notes
        assert found.served_bytes >= 0.99 * found.bytes
        assert found.planned_peak <= 1.02 * found.lower_bound
        assert found.reserved_bytes == torch.cuda.memory_reserved()
    before = torch.cuda.memory_stats()
    for rows in (500, 900, 500, 500, 900):
        step(rows)
    steps.end()
    after = torch.cuda.memory_stats()
    # Plans change from step to step, the arena does not.
    assert all(after[name] == before[name] for name in ("num_device_alloc", "num_device_free"))
    assert steps.report().plans == 2
    assert steps.report().served_bytes >= 0.99 * steps.report().bytes
    steps.close()
    assert notes == []


def test_an_evaluation_may_take_the_memory_of_the_arena_and_steps_get_it_back(allocator):
    notes: list[str] = []
    steps = PlannedSteps(allocator, 0, notes.append)
    weight = torch.zeros(1000, device="cuda", requires_grad=True)

    def step():
        steps.begin("step")
        x = torch.zeros(20_000, 1000, device="cuda")
        for _ in range(5):
            x = (x + weight).relu() * 2
        x.sum().backward()
        weight.grad = None

    for _ in range(SETTLING + 2):
        step()
    steps._solving.solving._process.wait()
    for _ in range(2):
        step()
    steps.end()
    arena = steps.report().arena_bytes
    assert arena > 200 * MiB
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * MiB) / total)
    try:
        taken(arena // 2 + 64 * MiB)  # an evaluation, which is over behind it
        assert allocator.statistics(0).arena_bytes == 0
        for _ in range(3):
            step()
        steps.end()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    found = steps.report()
    assert (found.state, found.arena_bytes) == ("planned", arena)
    assert found.served_bytes >= 0.99 * found.bytes
    (note,) = notes
    assert "memory ran out outside of planned steps" in note
    steps.close()


def test_two_recorded_lengths_plan_all_of_a_bucket(allocator):
    notes: list[str] = []
    steps = PlannedSteps(allocator, 0, notes.append)
    weight = torch.zeros(1000, device="cuda", requires_grad=True)

    def step(rows):
        weight.grad = None
        steps.begin("rows", rows)
        x = torch.zeros(rows, 1000, device="cuda")
        for _ in range(5):
            x = (x + weight).relu() * 2
        x.sum().backward()

    for rows in (700, 611, 500, 500, 533):  # the third is recorded, and the fifth, which is another length
        step(rows)
        if steps._solving is not None:
            steps._solving.solving._process.wait()
    step(600)
    steps._solving.solving._process.wait()
    step(600)
    steps.end()
    before = torch.cuda.memory_stats()
    for rows in (501, 700, 317, 704, 512, 699):
        step(rows)
        steps.end()
        found = steps.report()
        assert found.served_bytes >= 0.99 * found.bytes, (rows, found, notes)
    after = torch.cuda.memory_stats()
    assert all(after[name] == before[name] for name in ("num_device_alloc", "num_device_free"))
    assert found.plans == 1
    step(900)  # longer than the bucket of 700: placed from the same recordings, while it is served natively
    steps._solving.solving._process.wait()
    for rows in (900, 500):
        step(rows)
        steps.end()
        assert steps.report().served_bytes >= 0.99 * steps.report().bytes
    assert steps.report().plans == 1
    steps.close()
    assert notes == []


def long_lived():
    """Tensors of which each has a segment nearly to itself, with what they hold."""
    kept, between = [], []
    for at in range(4):
        between.append(taken(64 * MiB))
        half = between[-1].numel() // 2
        del between[-1]  # the next one is put where it was
        kept.append(taken(2 * MiB + at).fill_(0))
        kept[-1].copy_(torch.arange(kept[-1].numel(), dtype=torch.int64).to(torch.uint8) + at)
        between.append(taken(half))  # and what is left of it is in use until later
    return kept


def test_long_lived_tensors_are_moved_together(allocator):
    kept = long_lived()
    views, expected = [tensor[3:1000] for tensor in kept], [tensor.cpu() for tensor in kept]
    torch.cuda.empty_cache()
    before, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    given = compact([*kept, *views, torch.ones(3)], 0)
    assert given == before - torch.cuda.memory_reserved() > 32 * MiB
    assert torch.cuda.memory_allocated() == allocated
    for tensor, view, values in zip(kept, views, expected, strict=True):
        assert view.data_ptr() == tensor.data_ptr() + 3
        assert torch.equal(tensor.cpu(), values)
        assert torch.equal(view.cpu(), values[3:1000])
    assert compact(kept, 0) == 0


def test_nothing_is_moved_where_somebody_else_lives_too_or_knows_addresses(allocator):
    kept = long_lived()
    addresses = [tensor.data_ptr() for tensor in kept]
    torch.cuda.empty_cache()
    compact(kept[:1], 0)
    assert [tensor.data_ptr() for tensor in kept[1:]] == addresses[1:]
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        private = taken()
    addresses = [tensor.data_ptr() for tensor in kept]
    assert compact(kept, 0) == 0
    assert [tensor.data_ptr() for tensor in kept] == addresses
    del private, pool
