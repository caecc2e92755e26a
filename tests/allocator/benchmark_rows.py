"""What ``benchmarks.allocator`` measures of a stack without products, on an imitated device; prints it as JSON lines.

    python -m tests.allocator.benchmark_rows
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch

from benchmarks import allocator as benchmark
from benchmarks.harness.contenders import CONTENDERS
from benchmarks.harness.geometry import Scope
from benchmarks.harness.job import Job, Settings
from memo_runtime.profiling import machine
from tests.allocator.wrapped_steps import Net


class Contender:
    """Trains the stack; of ``benchmarks.harness.contenders.base.Contender`` what is called."""

    device = torch.device("cuda", 0)

    def __init__(self, job: Job) -> None:
        model = Net().cuda()
        self.subject = SimpleNamespace(model=model, optimizer=None)
        self.hidden: torch.Tensor | None = None

    def start(self, tokens: int) -> None:
        self.hidden = torch.zeros(1, tokens, 64, device="cuda")

    def batch(self) -> tuple[torch.Tensor, ...]:
        return () if self.hidden is None else (self.hidden,)

    def step(self, look=None) -> None:
        self.subject.model(self.hidden).backward()
        if look is not None:
            look({name: p.grad for name, p in self.subject.model.named_parameters()})
        self.subject.model.zero_grad(set_to_none=True)

    def finish(self) -> None:
        self.hidden = None


def main() -> None:
    CONTENDERS["stack"] = Contender
    machine.settle_libraries = lambda *arguments: None  # nothing can be multiplied there
    settings = Settings(
        geometry="tiny", scope=Scope.BLOCKS, blocks=4, device="cuda", dtype="bfloat16", attention="auto"
    )  # fmt: skip
    job = Job(contender="stack", settings=settings, lengths=(16384, 32768))
    for way, varied in (("native", False), ("planned", False), ("planned", True)):
        for row in benchmark.work(job, way, 2, varied=varied):
            print(json.dumps({"way": way, "varied": varied, **row}))


if __name__ == "__main__":
    main()
