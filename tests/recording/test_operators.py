"""The dispatch recorder: lifetimes of storages, aliases, saved tensors, blocks."""

import gc

import pytest
import torch
from torch import nn

from memo_runtime.recording.marks import marked
from memo_runtime.recording.operators import OperatorRecorder
from memo_runtime.traces.trace import Phase


def load_at(trace, tick):
    return sum(request.size for request in trace.requests if request.lower <= tick < request.upper)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_storage_is_one_request_with_its_lifetime(device):
    x = torch.ones(256, device=device)
    with OperatorRecorder([x]) as recorder:
        y = x * 2  # one storage
        z = y.view(16, 16)  # a view of it
        z.add_(1)  # in place
        del y
        w = z.t() + 1  # another one
        del z  # the first one's end
        v = w * 2
        del w, v
    trace = recorder.trace()
    lives = [(request.lower, request.upper, request.size) for request in trace.requests]
    assert lives == [(0, 7, 1024), (1, 3, 1024), (2, 5, 1024), (4, 6, 1024)]
    assert trace.fault() is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_saved_tensors_live_until_backward_is_done_with_them(device):
    x = torch.ones(512, device=device, requires_grad=True)
    with OperatorRecorder([x]) as recorder:
        y = x.exp()
        total = y.sum()
        del y  # exp's backward keeps its result
        recorder.begin(Phase.BACKWARD)
        total.backward()
        recorder.end(Phase.BACKWARD)
        del total
    trace = recorder.trace()
    span = trace.spans[0]
    saved = trace.requests[1]
    assert saved.size == 2048
    assert saved.lower < span.lower < saved.upper <= span.upper


def test_what_is_older_counts_as_there_from_the_start():
    x = torch.ones(64)
    with OperatorRecorder() as recorder:
        y = x + 1
        x.add_(y)
    assert [request.lower for request in recorder.trace().requests] == [0, 1]


def test_a_resized_storage_is_another_request():
    x = torch.ones(64)
    with OperatorRecorder() as recorder:
        y = x * 1
        y.untyped_storage().resize_(1024)
        y.add_(0)
        del y
    assert [request.size for request in recorder.trace().requests] == [256, 256, 1024]


def test_nothing_is_kept_alive_and_nothing_counts_after_the_end():
    with OperatorRecorder() as recorder:
        y = torch.ones(64)
    del y
    gc.collect()
    trace = recorder.trace()
    assert trace.requests[0].upper == trace.ticks == 1


class Model(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.embedding = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(3))
        self.checkpointed = checkpointed

    def forward(self, x):
        x = self.embedding(x)
        for block in self.blocks:
            if self.checkpointed:
                x = x + torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = x + block(x)
        return x


def record(model, x):
    named = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    with OperatorRecorder([*model.parameters(), x]) as recorder, marked(named, recorder):
        recorder.begin(Phase.STEP)
        model(x).sum().backward()
        recorder.end(Phase.STEP)
    return recorder.trace()


def test_blocks_are_marked_forward_and_backward_in_order():
    trace = record(Model(), torch.ones(4, 8))
    said = [(span.phase.value, span.block[-1]) for span in trace.inside(trace.steps()[0])]
    assert said == [*(("forward", n) for n in "012"), *(("backward", n) for n in "210")]
    forward = {s.block: s for s in trace.spans if s.phase is Phase.FORWARD}
    backward = {s.block: s for s in trace.spans if s.phase is Phase.BACKWARD}
    # Two products and an activation make memory in each; all of forward is before all of backward.
    assert all(sum(s.lower <= r.lower < s.upper for r in trace.requests) == 3 for s in forward.values())
    assert max(s.upper for s in forward.values()) <= min(s.lower for s in backward.values())
    assert all(s.upper > s.lower for s in backward.values())


def test_reruns_are_seen_within_backward():
    trace = record(Model(checkpointed=True), torch.ones(4, 8))
    reruns = [span for span in trace.spans if span.phase is Phase.RERUN]
    backward = {s.block: s for s in trace.spans if s.phase is Phase.BACKWARD}
    assert [span.block[-1] for span in reruns] == ["2", "1", "0"]
    assert all(backward[s.block].lower <= s.lower and s.upper <= backward[s.block].upper for s in reruns)


def test_hooks_are_gone_afterwards():
    model = Model()
    record(model, torch.ones(4, 8))
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


def test_meta_and_cpu_are_alike():
    on_cpu = record(Model(), torch.ones(4, 8))
    on_meta = record(Model().to("meta"), torch.ones(4, 8, device="meta"))
    sizes = [[(r.lower, r.upper, r.size) for r in trace.requests] for trace in (on_cpu, on_meta)]
    assert sizes[0] == sizes[1]
    assert load_at(on_cpu, on_cpu.steps()[0].upper - 1) > 0
