"""Gradients of a block's inputs written over those of its results, where nobody else can see the latter.

Autograd holds the gradient that it hands to a backward until that is over, so its memory cannot be given back; but
once the last segment has read a tile of it, nothing reads that tile again, and the gradient of the block's input may
have the place. That is right only if nobody else holds it: a hook that keeps it, another use of the same tensor (a sum
hands one gradient to both sides), a caller who gave it. How many holders a gradient has that nobody else holds is found
out once, in a backward made for it: one that is a tensor of its own, and one that is a view, as behind a linear layer,
and holds what it is a view of.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from memo_runtime.capture.captured import Captured
from memo_runtime.capture.split import Mixer
from memo_runtime.records import TokenAxis

#: References from Python, from C++, and to the memory; of a view also the first two of what it is a view of.
Holders = tuple[int, ...]


def holders(gradients: Sequence[torch.Tensor | None], index: int) -> Holders | None:
    """Of one of the gradients that a backward was called with; None: there is none, or PyTorch does not tell."""
    one = gradients[index]
    if one is None or not hasattr(one, "_use_count"):
        return None
    storage = one.untyped_storage()
    found = sys.getrefcount(one), one._use_count(), torch._C._storage_Use_Count(storage._cdata)
    base: Any = one._base if one._is_view() else None
    return found if base is None else (*found, sys.getrefcount(base), base._use_count())


class _Probe(torch.autograd.Function):
    """Takes note of the holders of a gradient that only autograd holds."""

    @staticmethod
    def forward(ctx: Any, found: list[Holders | None], source: torch.Tensor) -> torch.Tensor:
        ctx.found = found
        return source.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, torch.Tensor | None]:
        ctx.found.append(None if _is_watched() else holders(gradients, 0))
        return None, gradients[0]


def sole_holders(device_type: str) -> frozenset[Holders] | None:
    """What ``holders`` says where nobody else holds the gradient; None: that cannot be told now, or with this PyTorch.

    Backward runs in another thread for each kind of device, so each has a count of its own. A debugger may hold the
    variables of a frame that it looks at: a count that was taken then would be too high ever after.
    """
    if _is_watched():
        return None
    if device_type not in _SOLE:
        _SOLE[device_type] = _found_out(device_type)
    return _SOLE[device_type]


#: By kind of device, what was found out.
_SOLE: dict[str, frozenset[Holders] | None] = {}


def _is_watched() -> bool:
    """A tracer, a profiler in Python or a debugger is told of what this thread runs."""
    monitoring = getattr(sys, "monitoring", None)
    debugged = monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None
    return debugged or sys.gettrace() is not None or sys.getprofile() is not None


def _found_out(device_type: str) -> frozenset[Holders] | None:
    found: list[Holders | None] = []
    with torch.inference_mode(False), torch.enable_grad():
        source = torch.zeros(2, device=device_type, requires_grad=True)
        for shape in ((2,), (1, 2)):
            seen = _Probe.apply(found, source)  # type: ignore[no-untyped-call]
            torch.autograd.grad((seen.view(shape) * 2.0 if shape != source.shape else seen * 2.0).sum(), source)
    return frozenset(one for one in found if one is not None) or None


def overwritten(captured: Captured) -> dict[fx.Node, fx.Node]:
    """Inputs of a block whose gradient may be written over that of a result: input -> result.

    Both are as long and as wide, of one dtype and order in memory, and the segment that makes the result is the last to
    use the input. One of each segment: the gradient of a second may be the very one that the first is written over.
    """
    stages = captured.stages
    found: dict[fx.Node, fx.Node] = {}
    inputs = {node for node, _ in captured.arguments} & set(stages.differentiable)
    used: set[fx.Node] = set()
    for stage in reversed(stages.stages):
        if isinstance(stage, Mixer):
            used.update(stage.node.all_input_nodes)
            continue
        for result in [] if stage.by_rows else stage.outputs:
            alike = [
                node for node in stage.sources
                if node in inputs - used - found.keys() and _alike(captured, node, result)
                and isinstance(stage.axes[node], TokenAxis) and stage.axes[node] == stage.axes[result]
            ]  # fmt: skip
            if alike and result not in used and captured.outputs.count(result) == 1:
                found[alike[0]] = result
                break
        used.update(stage.sources)
    return found


def _alike(captured: Captured, node: fx.Node, result: fx.Node) -> bool:
    first, second = node.meta["val"], result.meta["val"]
    text = captured.traced.token.text
    shapes = [[text(size) for size in one.shape] for one in (first, second)]
    if first.dtype != second.dtype or result not in captured.stages.differentiable or shapes[0] != shapes[1]:
        return False
    # Behind a transpose the input lies in another order than what the block makes of it, and so does its gradient.
    strides = zip(shapes[0], first.stride(), second.stride(), strict=True)
    return all(size == "1" or text(one) == text(other) for size, one, other in strides)
