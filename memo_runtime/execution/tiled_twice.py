"""What a backward by tiles refuses: gradients of its gradients, and several gradients at once.

What it computes has no graph. A second derivative would silently lack every term that leads through it, so whoever asks
for one is told. Autograd runs only what leads to the inputs that a pass is asked for (``autograd.grad``,
``backward(inputs=...)``), so the refusal lies in front of all that the gradients depend on: the call's own node, behind
which are its parameters and arguments, and the gradients that came in. The way to the own node is an empty tensor that
the call yields and saves beside the rest: autograd gives a saved result its node back, and no node holds itself so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from memo_runtime.errors import CaptureRefusedError

_ONCE = (
    "'{name}' runs by tiles, and the gradients of tiles cannot be differentiated again (create_graph=True). Would "
    "work: policy='replay' or policy='swap'"
)
_BATCHED = (
    "it runs by tiles, and gradients of tiles cannot be computed for several at once (is_grads_batched=True, "
    "jacobian(vectorize=True), torch.func.vmap). Would work: one after another with retain_graph=True, or "
    "policy='replay' or policy='swap'"
)


def mark(like: torch.Tensor) -> torch.Tensor:
    """A result that is nothing, by which a call finds its own node again: saved as the last of its tensors."""
    return like.new_empty(0, dtype=torch.float32)


def differentiable_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """``backward`` of a call that saves its ``mark``, without a graph; who goes back through what it yields is told.

    Unlike with PyTorch's own also where the gradients that come in have no graph: what comes out depends on parameters
    all the same, and a penalty on it would be taken for a constant.

    Raises:
        CaptureRefusedError: the gradients that come in are several at once.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        name = ctx.run.owner or "a block"
        if any(one is not None and _is_batched(one) for one in grads):
            raise CaptureRefusedError(name, _BATCHED)
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        reached = [ctx.saved_tensors[-1], *(one for one in grads if one is not None and one.requires_grad)]
        with torch.no_grad():
            results = backward(ctx, *grads)
        given = (*results, *reached)
        refusal = torch._C._functions.DelayedError(_ONCE.format(name=name).encode(), len(given))
        told: tuple[Any, ...] = refusal(*given)[: len(results)]
        return told

    return run


def _is_batched(grad: torch.Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad)
