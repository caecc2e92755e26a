"""A wrapped model's steps on an imitated device, by PyTorch's allocator and by plan; prints what both report as JSON.

    python -m tests.allocator.wrapped_steps

Nothing can be multiplied there, so blocks work element by element, and the libraries of matrix products are left alone;
and as kernels do nothing, nothing is run again and compared.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.arena.steps import SETTLING
from memo_runtime.lookup import find_wrapped
from memo_runtime.profiling import model as profiling


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(64)), nn.Parameter(torch.zeros(64))

    def forward(self, x):
        return x + torch.relu(x * self.scale + self.shift) * 2


class Net(nn.Module):
    def __init__(self, block: type[nn.Module] = Block):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.sum()


def peaks(layout: str, steps: int = 10) -> dict[str, int]:
    """Of the last of ``steps``, with an evaluation between two of them."""
    model = Net().cuda()
    memo.wrap(model, policy="swap", layout=layout, blocks=list(model.blocks))
    for step in range(steps):
        x = torch.zeros(1, 4096, 64, device="cuda")
        model(x).backward()
        model.zero_grad(set_to_none=True)
        if step == SETTLING + 1 and steps == 10 and layout != "native":
            find_wrapped(model).memory._steps._solving.solving._process.wait()
        if step == 7:
            with torch.no_grad():
                model(x)
    report = memo.report(model)
    memo.unwrap(model)
    found = {"peak": report.totals.peak_bytes, "allocated": torch.cuda.memory_allocated()}
    if report.arena is not None:
        arena = report.arena
        found |= {
            "notes": report.notes, "state": arena.state, "requests": arena.requests, "served": arena.served,
            "misses": arena.misses, "planned_peak": arena.planned_peak, "bound": arena.lower_bound,
        }  # fmt: skip
    return found


if __name__ == "__main__":
    profiling.settle_libraries = lambda *arguments: None
    with tempfile.TemporaryDirectory() as folder:
        kept = str(Path(folder) / "steps.json.gz")
        # The last is the first step of another wrapped model, and of a run of its own as far as a file goes.
        print(json.dumps([peaks("native"), peaks("planned"), peaks(kept), peaks(kept, steps=2)]))
