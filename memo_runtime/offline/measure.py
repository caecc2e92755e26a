"""One block on meta at one length: its work, and the memory that it takes while it runs.

The same runs as profiling/timing.py makes on a device: a forward, a backward from a gradient of ones, a rerun with its
mixers replaced. Peaks are beyond what was there before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.containers import leaves_of
from memo_runtime.blocks.operators import pin_kind
from memo_runtime.blocks.pins import CaptureMode, ReplayMode
from memo_runtime.blocks.rerun import run_again, stops_early
from memo_runtime.offline.work import Heads, Work, WorkMeter
from memo_runtime.recording.meta_attention import fused_attention_on_meta
from memo_runtime.recording.meta_scalars import PlainAnswers
from memo_runtime.recording.operators import OperatorRecorder
from memo_runtime.records import BlockProfile, PinKind
from memo_runtime.traces.trace import Phase, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRun:
    """What one block does and takes at ``tokens`` tokens; ``trace`` has its forward and backward as spans."""

    tokens: int
    forward: Work
    backward: Work
    rerun: Work
    forward_peak: int
    backward_peak: int
    rerun_peak: int
    output: int
    heads: tuple[Heads, ...]
    trace: Trace


def stretched(call: BlockCall, profile: BlockProfile, tokens: int) -> BlockCall:
    """``call`` on meta with ``tokens`` tokens."""
    leaves: dict[int, Any] = {}
    for axes in profile.arguments:
        tensor = call.leaves[axes.leaf]
        shape = [tokens if dim in axes.dims else size for dim, size in enumerate(tensor.shape)]
        longer = torch.empty(shape, dtype=tensor.dtype, device="meta")
        leaves[axes.leaf] = longer.requires_grad_(tensor.requires_grad)
    return call.replaced(leaves)


def run_block(block: nn.Module, call: BlockCall, profile: BlockProfile, tokens: int) -> BlockRun:
    """Run ``block`` (on meta) forward, backward and again on ``tokens`` tokens."""
    call = stretched(call, profile, tokens).detached(fresh=(profile.input_leaf,))
    existing = [*block.parameters(), *block.buffers(), *(tensor for _, tensor in call.tensors())]
    meter = WorkMeter()
    # Recorded innermost, counted outside of it.
    with fused_attention_on_meta(), PlainAnswers(), OperatorRecorder(existing) as recorder, meter, torch.enable_grad():
        works, output, count = _forward_and_backward(block, call, recorder, meter)
    trace = recorder.trace()
    heads = tuple(meter.heads)
    again = OperatorRecorder(existing)
    with fused_attention_on_meta(), PlainAnswers():
        mixers = _mixers(block, call)
        last = count - 1 if count and stops_early(block) else None
        with again, meter:
            again.begin(Phase.RERUN)
            run_again(block.forward, call, _drop, mode=ReplayMode(mixers.captured, written=mixers.written), last=last)
            again.end(Phase.RERUN)
            rerun = meter.take()
    return BlockRun(
        tokens=tokens,
        forward=works[0],
        backward=works[1],
        rerun=rerun,
        forward_peak=peak_above_start(trace, Phase.FORWARD),
        backward_peak=peak_above_start(trace, Phase.BACKWARD, base=Phase.FORWARD),
        rerun_peak=peak_above_start(again.trace(), Phase.RERUN),
        output=output,
        heads=heads,
        trace=trace,
    )


def _forward_and_backward(
    block: nn.Module, call: BlockCall, recorder: OperatorRecorder, meter: WorkMeter
) -> tuple[tuple[Work, Work], int, int]:
    """Works of both, bytes of the results, and how many tensors were saved."""
    args, kwargs = call.arguments()
    count = 0

    def saved(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return tensor

    recorder.begin(Phase.FORWARD)
    with saved_tensors_hooks(saved, _same):
        outputs = _results(block.forward(*args, **kwargs))
    forward = meter.take()
    recorder.end(Phase.FORWARD)
    size = sum(tensor.numel() * tensor.element_size() for tensor in outputs)
    inputs = [tensor for _, tensor in call.tensors() if tensor.requires_grad]
    inputs += [parameter for parameter in block.parameters() if parameter.requires_grad]
    recorder.begin(Phase.BACKWARD)
    if outputs and inputs:
        ones = [torch.ones_like(tensor) for tensor in outputs]
        # Who takes the results does not keep them for this block's sake.
        edges = [get_gradient_edge(tensor) for tensor in outputs]
        outputs.clear()
        gradients = torch.autograd.grad(edges, inputs, ones, allow_unused=True)
        del ones, gradients
    recorder.end(Phase.BACKWARD)
    return (forward, meter.take()), size, count


def _mixers(block: nn.Module, call: BlockCall) -> CaptureMode:
    """What its mixers give, by call."""
    capture = CaptureMode(lambda key: None if pin_kind(key[0]) == PinKind.MIXER else ())
    args, kwargs = call.arguments()
    with torch.enable_grad(), capture:
        block.forward(*args, **kwargs)
    return capture


def peak_above_start(trace: Trace, phase: Phase, *, base: Phase | None = None) -> int:
    """Most bytes alive in ``phase`` beyond those alive when it (or the phase ``base``) began."""
    spans = {span.phase: span for span in trace.spans}
    span, start = spans[phase], spans[base or phase].lower
    load = before = peak = 0
    for tick, (index, allocates) in enumerate(trace.events()):
        if tick == start:
            before = load
        load += trace.requests[index].size if allocates else -trace.requests[index].size
        if span.lower <= tick < span.upper:
            peak = max(peak, load)
    return max(0, peak - before)


def _results(output: object) -> list[torch.Tensor]:
    return [leaf for leaf in leaves_of(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _drop(index: int, tensor: torch.Tensor) -> None:
    """What a rerun saves is written into buffers that the plan counts."""
