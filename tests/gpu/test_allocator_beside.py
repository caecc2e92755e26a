"""The planned allocator beside what else a process does: a bound on its memory, NCCL, sharded weights, memcheck."""

import gc
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from memo_runtime.arena.steps import SETTLING, PlannedSteps
from tests.house.sources import ROOT

pytestmark = pytest.mark.gpu
MiB = 1 << 20
CHECKER = shutil.which("compute-sanitizer")
ANNOTATE = getattr(torch.cuda.memory, "_annotate_tensor", None)


def in_a_row(count, size=16 * MiB):
    """Slots that live at once, one behind the other."""
    return [(i, 2 * count, size, i * size, 0) for i in range(count)]


def taken(size=16 * MiB):
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def test_a_bound_on_the_process_counts_the_arena_once(allocator):
    torch.cuda.empty_cache()
    allocator.arm(0, in_a_row(4), 64 * MiB)
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 32 * MiB) / total)
    try:
        allocator.begin_step(0)
        planned = [taken() for _ in range(4)]  # in the arena, which was there before
        assert all(allocator.holds(0, tensor.data_ptr()) for tensor in planned)
        beside = taken(28 * MiB)
        with pytest.raises(torch.OutOfMemoryError):
            taken(28 * MiB)
        assert [allocator.holds(0, tensor.data_ptr()) for tensor in planned] == [True] * 4
        allocator.end_step(0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del planned, beside


def test_statistics_summary_and_snapshot_agree(allocator):
    allocator.arm(0, in_a_row(4), 64 * MiB)
    torch.cuda.reset_peak_memory_stats()
    allocator.begin_step(0)
    before = torch.cuda.memory_stats()
    kept = [taken(), taken(10 * MiB + 3), taken(5), torch.empty(3, device="cuda")]
    stats = torch.cuda.memory_stats()
    rounded = sum(-(-t.untyped_storage().nbytes() // 512) * 512 for t in kept)
    assert stats["allocated_bytes.all.current"] - before["allocated_bytes.all.current"] == rounded
    assert stats["allocation.all.current"] - before["allocation.all.current"] == len(kept)
    assert stats["requested_bytes.all.current"] - before["requested_bytes.all.current"] == sum(
        t.untyped_storage().nbytes() for t in kept
    )
    for part in ("allocated_bytes", "active_bytes", "requested_bytes", "allocation"):
        small, large = stats[f"{part}.small_pool.current"], stats[f"{part}.large_pool.current"]
        assert stats[f"{part}.all.current"] == small + large
    assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == stats["allocated_bytes.all.peak"]
    segments = [s for s in torch.cuda.memory_snapshot() if s["device"] == 0]
    assert sum(s["allocated_size"] for s in segments) == torch.cuda.memory_allocated()
    assert sum(s["total_size"] for s in segments) == torch.cuda.memory_reserved()
    for segment in segments:
        assert sum(b["size"] for b in segment["blocks"]) == segment["total_size"]
    summary = torch.cuda.memory_summary(abbreviated=False)
    assert f"{torch.cuda.memory_allocated() // 1024} KiB" in summary
    del kept
    allocator.end_step(0)


@pytest.mark.skipif(ANNOTATE is None, reason="this torch has no annotations of memory")
def test_annotations_are_of_planned_tensors_too(allocator):
    assert torch._C._cuda_memoryMetadataSupported()
    allocator.arm(0, in_a_row(2), 32 * MiB)
    native = taken()
    allocator.begin_step(0)
    planned = [taken(), taken()]
    assert all(allocator.holds(0, tensor.data_ptr()) for tensor in planned)
    ANNOTATE(planned[0], "nobody records")
    torch.cuda.memory._record_memory_history(max_entries=1000)
    try:
        ANNOTATE(planned[1][5:], "second")
        ANNOTATE(native, "native")
        ANNOTATE(planned[0], "first")
        first = planned.pop(0).data_ptr()  # where the arena begins, which itself is no tensor
        with pytest.raises(RuntimeError, match="no live allocation found"):
            torch._C._cuda_annotateMemory(first, "freed")
        entries = torch.cuda.memory._snapshot()["device_traces"][0]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
        allocator.end_step(0)
    found = [e for e in entries if e["action"] == "annotate"]
    assert [(e["user_metadata"], e["addr"], e["size"]) for e in found] == [
        ("second", planned[0].data_ptr(), 16 * MiB),
        ("native", native.data_ptr(), 16 * MiB),
        ("first", first, 16 * MiB),
    ]
    assert all(e["frames"] for e in found)
    del planned


@pytest.fixture
def one_rank():
    """A process group of this process alone, on NCCL."""
    import torch.distributed as dist

    if not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group(
        "nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )
    yield dist
    dist.destroy_process_group()


def served_by_themselves(allocator, step):
    """Results of eight steps natively, and of eight that plan themselves; what the last ones were served."""
    notes = []
    native = [step(at).clone() for at in range(8)]
    steps = PlannedSteps(allocator, 0, notes.append)
    planned = []
    for at in range(8):
        steps.begin("step")
        planned.append(step(at).clone())
        if at == SETTLING + 1:
            steps.wait()
    steps.end()
    report = steps.report()
    steps.close()
    print(f"\n{report} {notes}")
    return torch.stack(native), torch.stack(planned), report


def test_collectives_read_and_write_planned_tensors(allocator, one_rank):
    def step(at):
        pieces = [torch.full((1 << 20,), float(at + i), device="cuda") for i in range(4)]
        works = [one_rank.all_reduce(piece, async_op=True) for piece in pieces]
        gathered = torch.empty(1 << 20, device="cuda")
        one_rank.all_gather_into_tensor(gathered, pieces[1])
        for work in works:
            work.wait()
        return sum(piece.sum() for piece in pieces) + gathered.sum()

    native, planned, report = served_by_themselves(allocator, step)
    assert torch.equal(planned, native)
    assert report.state == "planned"
    assert report.served_bytes >= 0.9 * report.bytes
    gc.collect()


def test_sharded_weights_are_gathered_into_planned_memory(allocator, one_rank):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(4))).cuda()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)

    def step(at):
        x = torch.full((2048, 1024), 0.01 * (at + 1), device="cuda")
        loss = model(x).square().mean()
        loss.backward()
        total = loss.detach() + sum(p.grad.to_local().double().sum() for p in model.parameters())
        model.zero_grad(set_to_none=True)
        return total

    native, planned, report = served_by_themselves(allocator, step)
    assert torch.allclose(planned, native, rtol=1e-6)
    assert report.state == "planned"
    # Gathered weights are resized storages of other streams, which have places of their own.
    assert report.served_bytes >= 0.9 * report.bytes
    gc.collect()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(CHECKER is None, reason="compute-sanitizer, which is part of the CUDA toolkit, is not in PATH")
def test_the_torture_is_clean_under_memcheck(built_allocator):
    command = [str(CHECKER), "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
    command += ["-m", "tests.gpu.torture", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
