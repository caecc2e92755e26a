"""The planned allocator on a GPU: what it serves, that its statistics are true, and that losses keep their bits."""

import gc
import json
import subprocess
import sys
import time

import pytest
import torch

import memo_runtime as memo
from memo_runtime.arena.plan import check_memory, enable, plan_arena
from memo_runtime.arena.steps import SETTLING
from memo_runtime.errors import AllocatorPlanError
from memo_runtime.lookup import find_wrapped
from memo_runtime.profiling.machine import settle_libraries
from memo_runtime.recording.allocator import AllocatorRecorder
from memo_runtime.traces.trace import Phase
from tests.gpu.models import batch, llama
from tests.house.sources import ROOT

pytestmark = pytest.mark.gpu
MiB = 1 << 20


class Training:
    """AdamW on a small Llama; each step has its own batch of one shape."""

    def __init__(self, tokens=2048):
        self.model = llama(torch.bfloat16, blocks=4, hidden=512)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.batches = [batch(1, tokens, seed) for seed in range(12)]
        self.losses = []
        self.at = 0

    def step(self):
        loss = self.model(**self.batches[self.at % 12]).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach().clone())
        self.at += 1


def plan_of(program, device=0):
    """A plan of the third of three recorded steps of ``program``."""
    with AllocatorRecorder(measure=False) as recorder:
        for _ in range(3):
            recorder.begin(Phase.STEP)
            program()
            recorder.end(Phase.STEP)
    return plan_arena(recorder.trace(), recorder.stream_handles, device, seconds=5.0, threads=None)


def run_planned(allocator, program, steps):
    for _ in range(steps):
        allocator.begin_step(0)
        program()
        allocator.end_step(0)


def test_a_training_step_is_served_by_plan(allocator):
    training = Training()
    for _ in range(3):
        training.step()
    plan = plan_of(training.step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    training.step()
    native = torch.cuda.memory_stats()
    enable(allocator, plan)
    run_planned(allocator, training.step, 2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    run_planned(allocator, training.step, 4)
    after = torch.cuda.memory_stats()
    last = allocator.statistics(0).last_step
    reserved, arena = after["reserved_bytes.all.peak"], allocator.statistics(0).arena_bytes
    print(f"\nserved {last.served} of {last.requests} requests, {last.served_bytes} of {last.bytes} bytes: {last}")
    print(f"arena {arena}, plan {plan.size}, bound {plan.lower_bound}, residents {plan.resident_bytes}")
    print(f"reserved planned {reserved}, native {native['reserved_bytes.all.peak']}")
    print(f"allocated planned {after['allocated_bytes.all.peak']}, native {native['allocated_bytes.all.peak']}")
    assert last.served_bytes >= 0.999 * last.bytes
    assert last.served >= 0.995 * last.requests
    assert plan.size <= 1.02 * plan.lower_bound
    for name in ("num_device_alloc", "num_device_free", "num_alloc_retries"):
        assert after[name] == before[name]
    # The same program asks for the same, wherever it is served; beside it, losses of four bytes pile up.
    assert 0 <= after["requested_bytes.all.peak"] - native["requested_bytes.all.peak"] <= 4 * len(training.losses)
    assert after["reserved_bytes.all.peak"] <= native["reserved_bytes.all.peak"]


@pytest.fixture
def kernels_that_repeat_their_bits():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_losses_keep_their_bits(allocator, kernels_that_repeat_their_bits):
    losses = {}
    for planned in (False, True):
        training = Training()
        for _ in range(3):
            training.step()
        plan = plan_of(training.step)
        if planned:
            enable(allocator, plan)
        run_planned(allocator, training.step, 6)
        losses[planned] = torch.stack(training.losses).cpu()
        served = allocator.statistics(0).total.served
        assert (served > 1000) == planned
        del training
    assert torch.equal(losses[False], losses[True])
    assert losses[True].isfinite().all()


def wrapped_losses(layout, steps=14):
    """Losses of a wrapped model's steps, and its report."""
    model = llama(torch.bfloat16, blocks=4, hidden=512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    memo.wrap(model, policy="replay", alpha=0.5, optimizer=optimizer, layout=layout)
    losses = []
    for at in range(steps):
        loss = model(**batch(1, 2048, at)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach().clone())
        if at == SETTLING + 1 and layout == "planned":
            find_wrapped(model).memory._steps._solving.solving._process.wait()  # so that the rest is served by plan
    report = memo.report(model)
    memo.unwrap(model)
    return torch.stack(losses).cpu(), report


def test_a_wrapped_model_plans_itself_and_keeps_its_bits(allocator, kernels_that_repeat_their_bits):
    expected, native = wrapped_losses("native")
    gc.collect()
    torch.cuda.empty_cache()
    found, report = wrapped_losses("planned")
    arena = report.arena
    print(f"\n{arena}\n{report}")
    assert native.arena is None
    assert torch.equal(found, expected)
    assert arena.state == "planned", report.notes
    assert arena.served_bytes >= 0.999 * arena.bytes
    assert arena.served >= 0.995 * arena.requests
    assert arena.planned_peak <= 1.02 * arena.lower_bound


def test_workspaces_of_products_have_segments_of_their_own(allocator):
    torch._C._cuda_clearCublasWorkspaces()
    cached = torch.empty(256 * MiB, dtype=torch.uint8, device="cuda")
    del cached  # a workspace that came now would take the front of it
    before = torch.cuda.memory_allocated()
    settle_libraries(torch.device("cuda", 0), torch.bfloat16)
    made = torch.cuda.memory_allocated() - before
    torch.cuda.empty_cache()
    free = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    weight = torch.ones(512, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    (weight @ weight).sum().backward()
    del weight
    print(f"\nworkspaces of {made / MiB:.1f} MiB, {free / MiB:.1f} MiB free beside what lives")
    assert torch.cuda.memory_allocated() == before + made, "others were made in a step"
    assert made > 0
    assert free < 256 * MiB - made


def test_statistics_are_what_lives(allocator):
    def program():
        kept = [torch.empty(size * 1000, dtype=torch.uint8, device="cuda") for size in (700, 5000, 1)]
        del kept[1]
        kept.append(torch.empty(9_000_000, dtype=torch.uint8, device="cuda"))
        live = sum(-(-t.numel() // 512) * 512 for t in kept)
        return kept, live

    enable(allocator, plan_of(program))
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    allocator.begin_step(0)
    kept, live = program()
    assert all(allocator.holds(0, tensor.data_ptr()) for tensor in kept)
    assert torch.cuda.memory_allocated() == start + live
    assert torch.cuda.max_memory_allocated() == start + live  # 5.7 MB before, 9.7 MB now
    snapshot = torch.cuda.memory._snapshot()
    blocks = [b for s in snapshot["segments"] if s["device"] == 0 for b in s["blocks"]]
    assert sum(b["size"] for b in blocks if b["state"] == "active_allocated") == torch.cuda.memory_allocated()
    assert sum(s["total_size"] for s in snapshot["segments"] if s["device"] == 0) == torch.cuda.memory_reserved()
    assert {t.data_ptr() for t in kept} <= {b["address"] for b in blocks if b["state"] == "active_allocated"}
    assert "Allocated memory" in torch.cuda.memory_summary()
    del kept
    assert torch.cuda.memory_allocated() == start
    allocator.end_step(0)


def test_history_and_the_visualiser_see_planned_tensors(allocator):
    def program():
        one = torch.empty(3 * MiB, dtype=torch.uint8, device="cuda")
        return [one, torch.empty(MiB, dtype=torch.uint8, device="cuda")]

    enable(allocator, plan_of(program))
    torch.cuda.memory._record_memory_history(max_entries=10_000)
    try:
        allocator.begin_step(0)
        kept = program()
        addresses = {tensor.data_ptr() for tensor in kept}
        snapshot = torch.cuda.memory._snapshot()
        del kept
        later = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
        allocator.end_step(0)
    made = [e for e in snapshot["device_traces"][0] if e["action"] == "alloc" and e["addr"] in addresses]
    assert [e["size"] for e in made] == [3 * MiB, MiB]
    assert all(e["frames"] for e in made)
    assert [e["time_us"] for e in made] == sorted(e["time_us"] for e in made)
    assert abs(made[0]["time_us"] / 1e6 - time.time()) < 60
    freed = [e for e in later["device_traces"][0] if e["action"] == "free_completed" and e["addr"] in addresses]
    assert len(freed) == 2
    from torch.cuda import _memory_viz

    assert "3.0MiB" in _memory_viz.segsum(snapshot) or _memory_viz.segsum(snapshot)
    assert _memory_viz.trace(snapshot)
    assert "<html" in _memory_viz.trace_plot(snapshot).lower() or _memory_viz.trace_plot(snapshot)


@pytest.mark.parametrize("begun", [False, True])
def test_history_that_somebody_begins_to_record_meanwhile_goes_on(begun):
    there = torch.empty(7 * MiB, dtype=torch.uint8, device="cuda")  # as workspaces of libraries are
    with AllocatorRecorder(measure=False) as recorder:
        recorder.begin(Phase.STEP)
        made = [torch.empty(3 * MiB, dtype=torch.uint8, device="cuda")]
        if begun:
            torch.cuda.memory._record_memory_history()
        made.append(torch.empty(5 * MiB, dtype=torch.uint8, device="cuda"))
        made.clear()
        recorder.end(Phase.STEP)
    try:
        assert torch._C._cuda_isHistoryEnabled() == begun
        trace = recorder.trace()
        (step,) = trace.spans
        assert [request.size for request in trace.requests if request.lower >= step.lower] == [3 * MiB, 5 * MiB]
        assert there.nbytes in [request.size for request in trace.requests if request.lower < step.lower]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def test_bytes_go_from_stream_to_stream_in_order(allocator):
    side = torch.cuda.Stream()
    wrong = torch.zeros(1, dtype=torch.int64, device="cuda")

    def program(tag=1):
        for stream in (torch.cuda.current_stream(), side, torch.cuda.current_stream()):
            with torch.cuda.stream(stream):
                tensor = torch.empty(4 * MiB, dtype=torch.int32, device="cuda")
                torch.cuda._sleep(200_000)
                tensor.fill_(tag)
                tag += 1
                torch.cuda._sleep(200_000)
                wrong.add_((tensor != tag - 1).any())
                del tensor

    # One range for all of them, which a plan of ours never has: streams keep apart there.
    size = 16 * MiB
    slots = [(0, 1, size, 0, 0), (2, 3, size, 0, side.cuda_stream), (4, 5, size, 0, 0)]
    allocator.arm(0, slots, size)
    for step in range(20):
        allocator.begin_step(0)
        program(10 * step)
        allocator.end_step(0)
    torch.cuda.synchronize()
    found = allocator.statistics(0).total
    assert found.waits >= 39
    assert found.served >= 60
    assert int(wrong) == 0


def test_graphs_and_private_pools_pass_by(allocator):
    def program():
        return torch.empty(2 * MiB, dtype=torch.uint8, device="cuda")

    enable(allocator, plan_of(program))
    source = torch.full((1000,), 3.0, device="cuda")
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.MemPool()
    allocator.begin_step(0)
    with torch.cuda.graph(graph):
        inside = program()
        result = source * 2
    with torch.cuda.use_mem_pool(pool):
        private = program()
    planned = program()
    assert [allocator.holds(0, t.data_ptr()) for t in (inside, private, planned)] == [False, False, True]
    planned.fill_(7)
    graph.replay()
    assert torch.equal(result, torch.full_like(result, 6.0))
    assert int(planned.min()) == 7
    assert allocator.statistics(0).bypassed >= 3
    del inside, private, planned, result, pool, graph
    allocator.end_step(0)


def test_compiled_code_is_served(allocator):
    @torch.compile
    def program(x):
        return ((x * 2).relu() @ x.t()).sum()

    x = torch.randn(1024, 1024, device="cuda")
    for _ in range(3):
        expected = program(x)
    enable(allocator, plan_of(lambda: program(x)))
    run_planned(allocator, lambda: program(x), 2)
    assert allocator.statistics(0).last_step.served > 0
    allocator.begin_step(0)
    assert torch.equal(program(x), expected)
    allocator.end_step(0)


def test_memory_that_is_not_there_is_refused_and_said(allocator):
    def program():
        return torch.empty(64 * MiB, dtype=torch.uint8, device="cuda")

    plan = plan_of(program)
    _, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 16 * MiB) / total)
    try:
        with pytest.raises(AllocatorPlanError, match=r"48\.\d* MiB too little|MiB too little"):
            enable(allocator, plan)
        with pytest.raises(AllocatorPlanError, match="memory"):
            allocator.arm(0, plan.slots(), plan.size)
        assert not allocator.statistics(0).armed
        with pytest.raises(torch.OutOfMemoryError):
            program()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    check_memory(plan, 0)
    enable(allocator, plan)
    allocator.begin_step(0)
    assert allocator.holds(0, program().data_ptr())
    allocator.end_step(0)


def test_an_arena_that_nobody_uses_goes_before_memory_runs_out(allocator):
    def program():
        return torch.empty(512 * MiB, dtype=torch.uint8, device="cuda")

    enable(allocator, plan_of(program))
    before = allocator.statistics(0).given_back
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * MiB) / total)
    try:
        kept = torch.empty(300 * MiB, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert allocator.statistics(0).given_back == before + 1
    assert not allocator.statistics(0).armed
    del kept


def test_planned_allocations_cost_no_more(allocator, quiet_machine):
    def program():
        for _ in range(100):
            torch.empty(3 * MiB, dtype=torch.uint8, device="cuda")

    def best_seconds(around):
        found = []
        for _ in range(20):
            around(True)
            begun = time.perf_counter()
            program()
            found.append(time.perf_counter() - begun)
            around(False)
        return min(found) / 100

    plan = plan_of(program)
    native = best_seconds(lambda begins: None)
    enable(allocator, plan)
    planned = best_seconds(lambda begins: allocator.begin_step(0) if begins else allocator.end_step(0))
    last = allocator.statistics(0).last_step
    print(f"\none torch.empty and its end: native {native * 1e6:.2f} us, planned {planned * 1e6:.2f} us")
    assert last.served == last.requests == 100
    assert planned <= 1.1 * native


@pytest.mark.parametrize("seconds", [10, pytest.param(330, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_torture(built_allocator, seconds):
    command = [sys.executable, "-m", "tests.gpu.torture", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{found}")
    assert found["wrong"] == 0
    assert found["live"] == 0
    # What is not served of these are bytes that strays keep: with four of them 0.909 on an H200, and 0.909 to 0.912 in
    # front of PyTorch's allocator on an imitated device. Extra requests that are served count too.
    assert found["served_expected"] > 0.85 * found["expected"]
    assert found["expected"] > 0.5 * found["requests"]
    assert found["operations"] >= 1_000_000 or seconds < 60
