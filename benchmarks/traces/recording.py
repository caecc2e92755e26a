"""One case, recorded from the making of the model to the end of its last step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from benchmarks.traces.cases import Case, Subject, build
from memo_runtime.blocks.stack import find_blocks
from memo_runtime.recording.allocator import AllocatorRecorder
from memo_runtime.recording.marks import marked
from memo_runtime.recording.operators import OperatorRecorder
from memo_runtime.traces.trace import Phase, Trace


def record(case: Case, device: torch.device, words: Mapping[str, str]) -> Trace:
    """The trace of ``case``; ``words`` are provenance that it cannot know. Blocks are marked in the last step."""
    cuda = device.type == "cuda"
    recorder: AllocatorRecorder | OperatorRecorder = AllocatorRecorder(device) if cuda else OperatorRecorder()
    with recorder:
        subject = build(case, device)
        for number in range(case.steps):
            if number + 1 < case.steps:
                _step(subject, recorder)
                continue
            blocks = [(ref.name, ref.module) for ref in find_blocks(subject.model)]
            with marked(blocks, recorder):
                _step(subject, recorder)
    fields = {name: str(value) for name, value in dataclasses.asdict(case).items()}
    return recorder.trace({**fields, **words})


def _step(subject: Subject, recorder: AllocatorRecorder | OperatorRecorder) -> None:
    recorder.begin(Phase.STEP)
    subject.loss().backward()
    recorder.begin(Phase.OPTIMIZER)
    subject.optimizer.step()
    subject.optimizer.zero_grad(set_to_none=True)
    recorder.end(Phase.OPTIMIZER)
    recorder.end(Phase.STEP)
