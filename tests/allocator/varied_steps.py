"""Steps of lengths that never come back, on an imitated device, of a model whose backward has scratch that is padded.

    python -m tests.allocator.varied_steps

prints what the allocator's report says of each as JSON.
"""

from __future__ import annotations

import json

import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.lookup import find_wrapped
from memo_runtime.profiling import model as profiling
from tests.allocator.wrapped_steps import Net
from tests.arena.reductions import scratch

COLUMNS = 640
#: The first ones, then those that never come back: those of tests/gpu/test_allocator_lengths.py, where the recorded
#: lengths are multiples of 512, and some that a longer step is placed again for.
RUNS = (
    ((1024, 1024, 1024, 1536, 2048, 2048), (1999, 1025, 1780, 777, 2047, 1281)),
    ((1000, 1000, 1000, 1500, 2000, 2000), (1999, 1025, 1780, 2047, 1281)),
    ((4000, 4000, 4000, 8000, 16000, 16000), (4001, 9000, 15_990)),
)


class Norm(torch.autograd.Function):
    """Of a norm what its allocations are: the gradient of the weight is a sum over tokens, which has scratch."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        product = gradient * x
        if size := scratch(x.shape[1], COLUMNS):
            kept, semaphores = (torch.empty(n, dtype=torch.uint8, device=x.device) for n in (size, 128))
            del kept, semaphores
        of_weight = torch.empty_like(weight)
        del product
        return gradient * weight, of_weight


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.ones(COLUMNS)), nn.Parameter(torch.zeros(COLUMNS))

    def forward(self, x):
        return x + torch.relu(Norm.apply(x, self.weight) + self.shift) * 2


def reports(first: tuple[int, ...], others: tuple[int, ...]) -> dict[str, object]:
    """What the report says after each of ``others``."""
    model = Net(Block).cuda()
    memo.wrap(model, policy="swap", layout="planned", blocks=list(model.blocks))
    steps = []
    for at, tokens in enumerate((*first, *others)):
        x = torch.zeros(1, tokens, COLUMNS, device="cuda")
        model(x).backward()
        model.zero_grad(set_to_none=True)
        del x
        memory = find_wrapped(model).memory
        memory.end()
        memory._steps.wait()
        if at >= len(first):
            found = memory.report()
            names = ("state", "plans", "requests", "served", "bytes", "served_bytes", "misses")
            steps.append({"tokens": tokens, **{name: getattr(found, name) for name in names}})
    found = {"notes": memo.report(model).notes, "steps": steps}
    memo.unwrap(model)
    return found


if __name__ == "__main__":
    profiling.settle_libraries = lambda *arguments: None
    print(json.dumps([reports(*run) for run in RUNS]))
