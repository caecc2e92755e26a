"""The step that a plan describes, as a trace: what its blocks allocate while they run, and what the plan holds between.

    forward    | block 0 | block 1 | ... | head, loss |      backward | ... | block 1 | block 0 |
    holds        copies out of 0 ----|     kept of every block ----------------------------- |
                                                              landing of 0 ---------- full of 0 |

What runs inside a block is what it did on meta at the planned length. Between its forward and its backward there is
what the plan keeps, sources of copies until the next block's forward is over, buffers of a fetch from the block above
on, and in backward all that it needs. A block by tiles is one request in forward, and in backward one for each stretch,
of what it takes at most. Head and loss are one request, temporaries of the optimizer's step another. Weights and
optimizer states are no part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from memo_runtime.offline.measure import BlockRun
from memo_runtime.planning.footprint import Footprint, footprint
from memo_runtime.planning.forecast import Surroundings
from memo_runtime.records import Executor, Plan
from memo_runtime.traces.trace import Phase, Trace, TraceBuilder


@dataclass(slots=True)
class _Step:
    """The trace so far, and the name of each of its requests."""

    builder: TraceBuilder = field(default_factory=TraceBuilder)
    names: list[str] = field(default_factory=list)

    def allocate(self, name: str, size: int) -> int | None:
        """None where there is nothing to allocate."""
        if size <= 0:
            return None
        self.names.append(name)
        return self.builder.allocate(size)

    def free(self, number: int | None) -> None:
        if number is not None:
            self.builder.free(number)

    @contextmanager
    def span(self, phase: Phase, block: str = "") -> Iterator[None]:
        self.builder.begin(phase, block)
        yield
        self.builder.end(phase, block)

    def passing(self, name: str, size: int) -> None:
        """A request that comes and goes."""
        self.free(self.allocate(name, size))

    def run(self, run: BlockRun, phase: Phase, name: str) -> list[int]:
        """Everything that a block allocates in ``phase``; what outlives it is returned."""
        span = next(span for span in run.trace.spans if span.phase is phase)
        numbers: dict[int, int] = {}
        count = 0
        for tick, (index, allocates) in enumerate(run.trace.events()):
            if not span.lower <= tick < span.upper:
                continue
            if allocates and run.trace.requests[index].size:
                number = self.allocate(f"{name} {count}", run.trace.requests[index].size)
                assert number is not None
                numbers[index] = number
                count += 1
            elif not allocates and index in numbers:
                self.builder.free(numbers.pop(index))
        return list(numbers.values())


def iteration_trace(plan: Plan, runs: Mapping[str, BlockRun]) -> tuple[Trace, list[str]]:
    """The step of ``plan``, and a name for each request.

    Args:
        runs: by name of a block, how it ran on meta at its planned length.
    """
    step = _Step()
    blocks = [
        (
            block.name,
            None if block.executor is Executor.TILED else runs[block.name],
            footprint(profiled, block, plan.profile.link),
        )
        for profiled, block in zip(plan.profile.blocks, plan.blocks, strict=True)
    ]
    tokens = plan.blocks[-1].tokens
    with step.span(Phase.STEP):
        across = step.allocate("block arguments", plan.profile.shared.at(tokens))
        # The first block's input is among what it keeps, if that stays; else it may go with the forward.
        around_blocks, stays = plan.profile.outside_forward.at(tokens), blocks[0][2].entry if blocks else 0
        goes = 0 if stays else min(around_blocks, plan.profile.entry.at(tokens))
        passing = step.allocate("first block's input", goes)
        embedded = step.allocate("embedding", max(0, around_blocks - stays - goes))
        kept = _forward(step, blocks)
        step.free(passing)
        around = Surroundings.of(plan.profile, tokens, norm_by_tiles=plan.norm_by_tiles)
        step.passing("head and loss", max(around.outside_peak, around.loss_peak) + around.outside_gradients)
        gradients = [step.allocate("gradients outside blocks", around.outside_gradients)]
        gradients += _backward(step, blocks, kept)
        gradients.append(step.allocate("gradients of embeddings", around.last_gradients))
        step.passing("backward of embeddings", around.embedding_peak)
        step.free(embedded)
        step.free(across)
        step.passing("optimizer's step", around.stepping)
        for gradient in gradients:
            step.free(gradient)
    return step.builder.build(provenance={"recorder": "plan"}), step.names


_Blocks = list[tuple[str, BlockRun | None, Footprint]]


def _forward(step: _Step, blocks: _Blocks) -> list[int | None]:
    """What is kept of every block."""
    kept: list[int | None] = []
    leaving: list[int | None] = []
    for name, run, held in blocks:
        with step.span(Phase.FORWARD, name):
            if run is None:
                made = held.skeletal - held.kept
                step.passing(f"tiles forward {name}", held.forward_peak + made + held.sent.under_way)
            else:
                for saved in step.run(run, Phase.FORWARD, f"forward {name}"):
                    step.free(saved)
        for source in leaving:
            step.free(source)
        leaving = [step.allocate(f"copies out {name}", held.outgoing)]
        kept.append(step.allocate(f"kept {name}", held.kept))
    for source in leaving:
        step.free(source)
    return kept


def _backward(step: _Step, blocks: _Blocks, kept: list[int | None]) -> list[int | None]:
    """The gradients, which stay."""
    gradients: list[int | None] = []
    landing: dict[int, int | None] = {}
    for index in reversed(range(len(blocks))):
        name, run, held = blocks[index]
        if index not in landing and held.copies:
            landing[index] = step.allocate(f"landing {name}", held.landing)
        below = next((i for i in range(index - 1, -1, -1) if blocks[i][2].copies), None)
        if below is not None and below not in landing and not blocks[below][2].late:
            landing[below] = step.allocate(f"landing {blocks[below][0]}", blocks[below][2].landing)
        rebuilt = step.allocate(f"rebuilt {name}", held.full - held.landing)
        with step.span(Phase.BACKWARD, name):
            step.passing(f"rerun {name}", held.rerun_peak)
            if run is None:
                for stretch, peak, _ in held.stretches:
                    step.passing(f"tiles {stretch} {name}", peak)
            else:
                for number in step.run(run, Phase.BACKWARD, f"backward {name}"):
                    step.free(number)
        step.free(rebuilt)
        step.free(landing.get(index))
        step.free(kept[index])
        gradients.append(step.allocate(f"gradients {name}", held.gradients))
    return gradients
