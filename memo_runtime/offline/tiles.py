"""What a block takes by tiles on a machine that is not there: captured on the CPU, timed by rates.

The capture and all bytes are those of a real run (``execution/tiled_profile.py``). Seconds are the work of its compiled
programs (``fusion.py``) at one tile, what is copied between tiles and tensors of full length, products that are left to
the caller of a program, and attention at the rate that the machine reaches. A capture is not compared with its block on
numbers here: that is what a run does before it uses one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from memo_runtime.blocks.ambient import AutocastState
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.stack import BlockRef
from memo_runtime.capture.captured import Captured, capture
from memo_runtime.capture.rules import arguments_of
from memo_runtime.capture.split import Mixer, Segment
from memo_runtime.config import longest_tile
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution.compilers import Program
from memo_runtime.execution.tiled_costs import tensor_bytes
from memo_runtime.execution.tiled_gradients import sum_dtype
from memo_runtime.execution.tiled_places import Placed
from memo_runtime.execution.tiled_profile import tile_programs, tiled_profile
from memo_runtime.execution.tiled_programs import Factors, Programs, RowFactors
from memo_runtime.execution.tiled_timing import TileTimes
from memo_runtime.machines.machine import Machine
from memo_runtime.offline.fusion import FusedWork
from memo_runtime.offline.materialise import real_block, real_call
from memo_runtime.offline.timing import seconds
from memo_runtime.offline.work import Work
from memo_runtime.recording.meta_attention import fused_attention_on_cpu
from memo_runtime.records import Growth, TiledProfile

#: Length for which the programs of segments that see a mask are cut; all else is the same at any length.
_TOKENS = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class _TileWork:
    """Of one segment and one tile: forward, and backward with nothing kept and with products kept."""

    forward: Work
    forward_keep: Work
    backward: Work
    backward_kept: Work


def tiles_of(ref: BlockRef, call: BlockCall, machine: Machine) -> tuple[TiledProfile | None, str]:
    """(what a block on meta takes by tiles, why it cannot run so). Its attention is not timed yet."""
    call = real_call(call, ref.name)
    try:
        # Dropout in attention is fused on a GPU, and so is attention without it here.
        with fused_attention_on_cpu():
            captured = capture(real_block(ref.module), call)
        if not captured.traced.allows(_TOKENS):
            raise CaptureRefusedError("forward", f"it takes another way for {_TOKENS:,} tokens")
        times = _times(captured, call, machine)

        def workspace(node: fx.Node) -> float:
            return _workspace(captured, node)

        return tiled_profile(captured, call, times, tokens=_TOKENS, workspace=workspace, fused=True), ""
    except CaptureRefusedError as error:
        return None, str(error)


def _workspace(captured: Captured, mixer: fx.Node) -> float:
    """Bytes by token that the backward of an attention takes beside its tensors, in cuDNN and in flash-attn 2.

    The gradient of queries is summed in float32, with a number for each row; where heads of keys are fewer, their
    gradients and those of values are made for each head of queries, and then added. Peaks of attention alone on an H100
    say so (``kernels`` of ``benchmarks/results/harness_8b_budget_h100.jsonl``). 0: it is no attention.
    """
    if mixer not in captured.attentions:
        return 0.0
    query, key = (arguments_of(mixer)[name].meta["val"] for name in ("query", "key"))
    size: float = int(captured.size(query.numel(), _TOKENS)) / _TOKENS
    keys: float = int(captured.size(key.numel(), _TOKENS)) / _TOKENS
    for_each_head = 2 * size * int(query.dtype.itemsize) if keys < size else 0.0
    return 4 * size + 4 * size / int(query.shape[-1]) + for_each_head


def with_attention(profile: TiledProfile, forward: Growth, backward: Growth) -> TiledProfile:
    """``profile`` with the seconds of its attention, if its tiles are timed at all."""
    if not profile.seconds_per_flop:
        return profile
    return replace(
        profile,
        forward_seconds=_sum(profile.forward_seconds, forward),
        backward_seconds=_sum(profile.backward_seconds, backward),
    )


def _sum(one: Growth, other: Growth) -> Growth:
    return Growth(
        constant=one.constant + other.constant,
        linear=one.linear + other.linear,
        quadratic=one.quadratic + other.quadratic,
    )


def _times(captured: Captured, call: BlockCall, machine: Machine) -> TileTimes | None:
    """Seconds by token of everything but attention; None where a run does not time tiles either."""
    mixers = captured.attentions
    if captured.mixers > len(mixers) or any(arguments_of(node)["attn_mask"] is not None for node in mixers):
        return None
    hidden: torch.Tensor = call.leaves[captured.input_leaf]
    tile = longest_tile(max(1, hidden.numel() // hidden.shape[-1] // captured.tokens(call)))
    forward = backward = saved = 0.0
    stages = captured.stages.stages
    for index, stage in enumerate(stages):
        if not isinstance(stage, Segment):
            continue
        work = _tile_work(captured, index, stage, _TOKENS, tile)
        ahead, back, kept, keep = (
            seconds(one, machine) / tile for one in (work.forward, work.backward, work.backward_kept, work.forward_keep)
        )
        forward += ahead
        backward += back
        saved += back - kept - (keep - ahead)
        if index + 1 < len(stages) and isinstance(stages[index + 1], Mixer):
            backward += ahead  # its results are made again for the backward of the mixer
    return TileTimes(Growth(linear=forward), Growth(linear=backward), forward, max(0.0, saved))


def _tile_work(captured: Captured, index: int, segment: Segment, tokens: int, tile: int) -> _TileWork:
    device = captured.arguments[0][0].meta["val"].device
    autocast = AutocastState.current(device.type)
    programs, tile = tile_programs(captured, index, tokens, tile, autocast, compiler=FusedWork)
    backward = _work(programs.backward)
    gradients = _gradients(captured, segment, programs, tokens, tile)
    return _TileWork(
        forward=_placed_work(programs.forward),
        forward_keep=_placed_work(programs.forward_keep),
        backward=_more(backward, gradients.traffic, gradients.matmul),
        backward_kept=_more(_work(programs.backward_kept), gradients.traffic, gradients.matmul),
    )


def _work(program: Program) -> Work:
    assert isinstance(program, FusedWork), "the compiler that was given made it"
    return program.work


def _placed_work(program: Placed) -> Work:
    return _more(_work(program.program), traffic=0, matmul=program.flops)


def _more(work: Work, traffic: int, matmul: int = 0) -> Work:
    return replace(work, traffic=work.traffic + traffic, matmul=work.matmul + matmul)


def _rows(captured: Captured, segment: Segment, node: fx.Node, tokens: int, tile: int) -> int:
    """Bytes of the rows of ``node``'s value that belong to a tile."""
    value = node.meta["val"]
    whole = int(captured.size(value.numel(), tokens)) * value.dtype.itemsize
    return whole * tile // tokens if segment.axes[node] is not None else 0


def _gradients(captured: Captured, segment: Segment, programs: Programs, tokens: int, tile: int) -> Work:
    """What adding up the gradients of one tile takes: those of rows are written once, those of weights are sums."""
    assert isinstance(programs.backward, FusedWork)
    results = _results(programs.backward.graph)
    flops = traffic = 0
    for node, place in zip(segment.sources, programs.places, strict=True):
        if place is None:
            continue
        if isinstance(place, RowFactors):
            flops += _flops(results[place.left], results[place.right])
            continue
        if segment.axes[node] is not None:
            traffic += 2 * _rows(captured, segment, node, tokens, tile)
            continue
        value = node.meta["val"]
        total = int(value.numel()) * sum_dtype(value.dtype).itemsize
        traffic += 2 * total
        if isinstance(place, Factors):
            flops += _flops(results[place.left], results[place.right])
        else:
            traffic += tensor_bytes(results[place])
    return Work(matmul=flops, traffic=traffic)


def _flops(left: torch.Tensor, right: torch.Tensor) -> int:
    return 2 * int(left.numel()) * int(right.shape[-1])


def _results(graph: fx.Graph) -> Sequence[torch.Tensor]:
    (output,) = (node for node in graph.nodes if node.op == "output")
    return [node.meta["val"] for node in output.args[0]]
