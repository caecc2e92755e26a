"""Traces from the CUDA allocator's history: whole, marked, and in agreement with the allocator's own counters."""

import pytest
import torch
from torch import nn

from memo_runtime.errors import TraceError
from memo_runtime.recording.allocator import AllocatorRecorder
from memo_runtime.recording.marks import marked
from memo_runtime.simulation.replay import simulate
from memo_runtime.traces.trace import Phase

pytestmark = pytest.mark.gpu


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)) for _ in range(4)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def record(steps=2, **options):
    torch.cuda.empty_cache()
    with AllocatorRecorder(**options) as recorder:
        model = Stack().cuda()
        x = torch.randn(4096, 512, device="cuda", requires_grad=True)
        with marked([(f"blocks.{i}", block) for i, block in enumerate(model.blocks)], recorder):
            for _ in range(steps):
                recorder.begin(Phase.STEP)
                model(x).square().mean().backward()
                model.zero_grad(set_to_none=True)
                x.grad = None
                recorder.end(Phase.STEP)
    return recorder.trace({"model": "stack"})


def test_the_history_is_whole_and_agrees_with_the_allocators_counters():
    trace = record()
    assert trace.fault() is None
    load = peak = 0
    for index, allocates in trace.events():
        load += trace.requests[index].size if allocates else -trace.requests[index].size
        peak = max(peak, load)
    measured = trace.measured
    # Requests are rounded to 512 bytes; what of a large block is below 1 MiB is not split off.
    assert peak <= measured.allocated_peak <= 1.02 * peak + (1 << 20)
    assert measured.allocated_peak <= measured.reserved_peak <= trace.capacity_bytes


def test_the_simulator_reserves_what_the_allocator_reserves():
    trace = record(steps=3)
    found, measured = simulate(trace), trace.measured
    assert found.retries == measured.retries == 0
    assert found.allocated_peak == pytest.approx(measured.allocated_peak, rel=0.005)
    assert found.reserved_peak == pytest.approx(measured.reserved_peak, rel=0.02, abs=2 << 20)


def test_steps_are_alike_and_blocks_are_marked():
    trace = record(steps=3)
    _, second, third = trace.steps()
    sizes = [[r.size for r in trace.requests if step.lower <= r.lower < step.upper] for step in (second, third)]
    assert sizes[0] == sizes[1]
    said = [(span.phase.value, span.block[-1]) for span in trace.inside(third)]
    assert said == [*(("forward", n) for n in "0123"), *(("backward", n) for n in "3210")]


def test_a_ring_that_is_too_short_is_an_error():
    with pytest.raises(TraceError, match="longer than what was kept"):
        record(max_entries=40)
