"""What a mixer takes and leaves beside its tensors, seen in a run of it on random numbers.

Attention runs on few tokens, and where its heads can be divided once more on one group of them at full length, or at
half a million tokens, beyond which the run alone would take longer than what is known of it is worth.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from memo_runtime.blocks.ambient import AutocastState
from memo_runtime.blocks.failures import first_line
from memo_runtime.blocks.operators import MASKED_ATTENTION
from memo_runtime.blocks.spans import spans_tensor
from memo_runtime.blocks.stopwatch import LONGEST_ATTENTION
from memo_runtime.capture.captured import Captured
from memo_runtime.capture.rules import arguments_of, operator_name
from memo_runtime.capture.split import Mixer
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution.mixers.attention import (
    Inputs,
    Kernel,
    Saved,
    Settings,
    attention_backward,
    attention_forward,
)
from memo_runtime.execution.mixers.by_graph import run_with_graph
from memo_runtime.execution.mixers.merging import merge_bytes
from memo_runtime.execution.mixers.registered import kernel_name, mixer_operator
from memo_runtime.execution.tiled_costs import tensor_bytes
from memo_runtime.execution.tiled_growth import polynomial
from memo_runtime.execution.tiled_heads import HEADS
from memo_runtime.execution.tiled_moments import Workspace
from memo_runtime.execution.tiled_rows import is_dense, lies_by_token
from memo_runtime.records import Growth, TokenAxis

logger = logging.getLogger("memo_runtime")

#: Tokens of the run of attention: enough for a kernel to show its workspace, few enough to be over at once.
_ATTENTION_TOKENS = {"cuda": 4096, "cpu": 64}
#: Kernels that round the length of their log-sum-exps up.
_ROUNDED = {"efficient": 32}


@dataclass(frozen=True, slots=True)
class Trial:
    """One mixer: its kernel, bytes of each tensor that its forward leaves, and bytes by token that it took.

    ``by_group``: the same of one group of heads, for all of them. ``merging``: bytes while two parts are merged.
    ``by_token``: its result lies in memory token by token, where its queries do.
    """

    kernel: Kernel
    saved: tuple[Growth, ...]
    workspace: Workspace
    by_group: Workspace
    merging: int = 0
    by_token: bool = False


def try_mixer(captured: Captured, mixer: Mixer, tokens: int, kernel: Kernel | None, heads: int = 1) -> Trial:
    """What one mixer takes at ``tokens`` tokens, with ``kernel`` if it is one of attention.

    ``heads``: into so many groups of heads it can be divided.
    """
    if mixer.by_graph:
        return _try_named(captured, mixer, tokens)
    node = mixer.node
    named = arguments_of(node)
    device = node.meta["val"].device
    length = min(tokens, _ATTENTION_TOKENS.get(device.type, 64))
    inputs = _inputs(captured, node, length)
    query, dtype = inputs.query, inputs.query.dtype
    biased = named["attn_mask"] in captured.stages.differentiable
    whole = replace(kernel, queries=0) if kernel is not None else None
    output, saved, taken = _run(inputs, Settings.of(named, query.shape[-1]), whole, by_rows=biased)
    workspace = taken[0] / length, taken[1] / length
    growths = [
        Growth(linear=tensor_bytes(one) / length, multiple=_ROUNDED.get(saved.kernel.name, 1)) for one in saved.tensors
        if isinstance(one, torch.Tensor) and one.is_floating_point() and is_dense(one)
    ]  # fmt: skip
    used, merging = saved.kernel, 0
    if kernel is not None and kernel.queries and kernel.name == used.name:
        used = kernel
        shape = (query.shape[0], query.shape[1], inputs.value.shape[-1])
        merging = merge_bytes(shape, kernel.queries, dtype, device.type)
    queries = [int(captured.size(one, length)) for one in named["query"].meta["val"].stride()]
    by_token = lies_by_token(output.stride()) and lies_by_token(queries)
    group = _one_group(captured, node, tokens, whole, heads) if heads > 1 and named["attn_mask"] is None else (0.0, 0.0)
    by_group = max(workspace[0], group[0]), max(workspace[1], group[1])
    return Trial(used, tuple(growths), workspace, by_group, merging, by_token)


def _inputs(captured: Captured, node: fx.Node, tokens: int, part: int = 1) -> Inputs:
    """Random ones of an attention; ``part``: of one of so many groups of heads."""
    named, dtype = arguments_of(node), node.meta["val"].dtype
    query, key, value = (_random(captured, named[name], tokens, part).to(dtype) for name in ("query", "key", "value"))
    mask = _random(captured, named["attn_mask"], tokens) if named["attn_mask"] is not None else None
    return Inputs(query, key, value, mask)


def _run(
    inputs: Inputs, settings: Settings, kernel: Kernel | None, *, by_rows: bool = False
) -> tuple[torch.Tensor, Saved, tuple[int, int]]:
    """(result, what the forward leaves, most bytes beside the tensors forward and backward) of one run."""
    meter = Meter(inputs.query.device)
    output, saved = attention_forward(inputs, settings, seed=0, by_rows=by_rows, kernel=kernel)
    forward = meter.beyond([output, *saved.tensors])
    grad = torch.ones_like(output)
    meter = Meter(inputs.query.device)
    grads = attention_backward(grad, inputs, output, saved, settings)
    return output, saved, (forward, meter.beyond([*grads]))


def _one_group(captured: Captured, node: fx.Node, tokens: int, kernel: Kernel | None, heads: int) -> Workspace:
    """Bytes by token of one of ``heads`` groups at its length, for all of them; (0, 0) where there is no room for it.

    Kernels choose how they work by the shape: of few heads over many tokens one may take more than its share of what
    it takes of all heads over few.
    """
    if not Meter.counts(node.meta["val"].device):
        return 0.0, 0.0
    tokens = min(tokens, LONGEST_ATTENTION)
    try:
        inputs = _inputs(captured, node, tokens, heads)
        settings = Settings.of(arguments_of(node), inputs.query.shape[-1])
        forward, backward = _run(inputs, settings, kernel)[2]
    except torch.OutOfMemoryError as error:
        logger.info("memo: attention by groups of heads is not tried at its length, there is no room for it: %s", error)
        return 0.0, 0.0
    return heads * forward / tokens, heads * backward / tokens


def _try_named(captured: Captured, mixer: Mixer, tokens: int) -> Trial:
    """A mixer that the user has named, on fake tensors: what its formula saves. Its workspace is not known.

    That of attention under spans is.
    """
    device = captured.arguments[0][0].meta["val"].device
    autocast = AutocastState.current(device.type)
    wanted = [node in captured.stages.differentiable for node in mixer.inputs]

    def saved(length: int) -> list[torch.Tensor]:
        with FakeTensorMode():
            shapes = [[int(captured.size(size, length)) for size in node.meta["val"].shape] for node in mixer.inputs]
            values = [torch.empty(shape, dtype=node.meta["val"].dtype, device=node.meta["val"].device)
                      for shape, node in zip(shapes, mixer.inputs, strict=True)]  # fmt: skip
            operator = mixer_operator(captured, mixer, length, autocast)
            try:
                return run_with_graph(operator, values, wanted, [at for _, at in mixer.results])[1]
            except RuntimeError as error:
                reason = f"what it saves cannot be told, since it does not run on fake tensors: {first_line(error)}"
                raise CaptureRefusedError(kernel_name(mixer), reason) from error

    by_length = {count * tokens: saved(count * tokens) for count in (1, 2, 3)}
    def size(at: int) -> Growth:
        return polynomial(lambda length: float(tensor_bytes(by_length[length][at])), tokens)

    chosen = [at for at, one in enumerate(by_length[tokens]) if one.is_floating_point() and is_dense(one)]
    inside = _masked_workspace(captured, mixer, tokens) if operator_name(mixer.node) == MASKED_ATTENTION else (0.0, 0.0)
    return Trial(Kernel(kernel_name(mixer)), tuple(size(at) for at in chosen), inside, inside)


def _masked_workspace(captured: Captured, mixer: Mixer, tokens: int) -> Workspace:
    """Seen under a window, whose kernel takes more inside than those that take long documents one by one."""
    node = mixer.node
    device = node.args[0].meta["val"].device  # type: ignore[union-attr]
    length = min(tokens, _ATTENTION_TOKENS.get(device.type, 64))
    query, key, value = (_random(captured, one, length) for one in node.args[:3])  # type: ignore[arg-type]
    places = torch.arange(length, device=device).expand(len(query), -1)
    spans = spans_tensor((places - length // 8).clamp(min=0), places + 1)
    meter = Meter(device)
    output, lse = torch.ops.memo_runtime.masked_attention(query, key, value, spans, node.args[4])
    forward = meter.beyond([output, lse])
    grad = torch.ones_like(output)
    meter = Meter(device)
    backward = torch.ops.memo_runtime.masked_attention_backward
    grads = backward(grad, query, key, value, spans, output, lse, node.args[4])
    return forward / length, meter.beyond([*grads]) / length


def _random(captured: Captured, node: fx.Node, tokens: int, part: int = 1) -> torch.Tensor:
    value = node.meta["val"]
    shape = [int(captured.size(size, tokens)) for size in value.shape]
    if part > 1:
        shape[HEADS] //= part
    if value.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool, device=value.device)
    if value.dim() == 4 and isinstance(captured.stages.axes[node], TokenAxis):
        batch, heads, length, depth = shape
        return torch.randn(batch, length, heads, depth, dtype=value.dtype, device=value.device).transpose(1, 2)
    return torch.randn(shape, dtype=value.dtype, device=value.device)


class Meter:
    """Device memory between two points, where an allocator counts it."""

    @staticmethod
    def counts(device: torch.device) -> bool:
        """There is one that counts."""
        return device.type == "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)

    def beyond(self, results: list[Any]) -> int:
        """Most bytes since then, beside those of ``results``."""
        if self._device is None:
            return 0
        held = sum(one.numel() * one.element_size() for one in results if isinstance(one, torch.Tensor))
        return max(0, torch.cuda.max_memory_allocated(self._device) - self._before - held)
