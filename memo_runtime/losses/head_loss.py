"""``linear_cross_entropy``: the loss of a linear head without a tensor of all logits.

Gradients are made in forward, tile by tile, while the logits of the tile exist. Made in backward they would
need the logits a second time: four matmuls instead of three. It costs no memory that matters: dX takes the
place of the hidden states, which are not saved, and dW is due a moment later in any case, since the loss ends
the forward. Only ``reduction="none"`` recomputes in backward: dW is a sum over tokens, and a weight per token
that comes later can no longer be multiplied into it.

Backward is then a multiplication by grad_output (a GradScaler's scale, 1 / accumulation steps). The mean's
1 / count is multiplied in before the matmuls, so that each gradient is rounded once when grad_output is a
power of two; for float16 it waits for grad_output, as 1 / count alone underflows.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memo_runtime.errors import ArgumentError, LossBackendError
from memo_runtime.losses import liger, tiles
from memo_runtime.losses.operands import check_classes, check_one_dtype, check_operands, check_options
from memo_runtime.losses.tiles import Criterion, Gradients, Head, Wanted
from memo_runtime.units import show_value

logger = logging.getLogger("memo_runtime")

_MORE = "its chunks of logits grow with the tokens, and here are larger than tiles"


class Backend(StrEnum):
    """Who computes the loss; ``auto`` is Liger where it can in no more memory, else the tiles of this package."""

    AUTO = "auto"
    LIGER = "liger"
    TILED = "tiled"
    NATIVE = "native"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """Everything of a call that is not differentiated."""

    criterion: Criterion
    reduction: str
    num_items: Tensor | float | None
    compute: torch.dtype
    tile: int
    backend: Backend


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    tile: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of ``hidden @ weight.T + bias`` against ``target``, without the logits of all tokens.

    Equals ``torch.nn.functional.cross_entropy`` on logits upcast to float32 (float64 stays float64), with
    softmax, losses and sums over tiles in that dtype. Works under autocast, with any of the operands frozen,
    and reads nothing back from the device (``backend="liger"``: once per call). No second derivative.

    Args:
        hidden: [..., D] hidden states.
        weight: [V, D] of the head; may be tied to an embedding.
        target: [...] int64 class indices.
        bias: [V] of the head.
        ignore_index: targets that count neither for the loss nor for the mean.
        reduction: ``mean`` over the targets that are not ignored, ``sum`` or ``none``.
        num_items: divides the sum in place of the number of targets (gradient accumulation); a number, or a
            tensor of one element, whose shape the loss then has. Goes with ``mean`` and ``sum``.
        logit_scale: factor on the logits (Cohere, Granite).
        softcap: ``c`` in ``c * tanh(logits / c)``, after the factor (Gemma).
        label_smoothing: in [0, 1].
        tile: tokens per tile; None: as many as have logits of 512 MiB (CPU: 256 MiB).
        backend: ``auto``, ``liger`` (an error where it cannot), ``tiled`` or ``native`` (all logits at once).

    Returns:
        float32 (float64 for float64) scalar, or [...] for ``none``; nan for a mean of nothing.

    Raises:
        ArgumentError, ArgumentTypeError: operands that do not go together, an unknown name, options that exclude each
            other; on CPU also a target that is no class (on CUDA the device reports it, as PyTorch's loss does).
        LossBackendError: ``backend="liger"`` and Liger cannot compute this loss.
    """
    criterion = Criterion(
        ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap, label_smoothing=label_smoothing
    )
    check_operands(hidden, weight, target, bias)
    check_options(criterion, reduction, num_items, tile)
    compute = _compute_dtype(hidden)
    flat_hidden, flat_target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    head = Head(hidden=flat_hidden, weight=weight, bias=bias, target=flat_target, compute=compute)
    chosen = _choose(head, criterion, reduction, backend)
    if chosen is Backend.NATIVE:
        loss = _native(head, criterion, reduction, num_items)
    else:
        tokens, vocabulary = flat_hidden.shape[0], weight.shape[0]
        call = _Call(
            criterion=criterion,
            reduction=reduction,
            num_items=num_items,
            compute=compute,
            tile=tile or tiles.tile_tokens(tokens, vocabulary, compute, hidden.device),
            backend=chosen,
        )
        loss = _apply(flat_hidden, weight, bias, flat_target, call)
    if reduction == "none":
        return loss.reshape(target.shape)
    return loss.reshape(num_items.shape) if isinstance(num_items, Tensor) else loss


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the head's matmul: autocast's where that is on (it leaves float64 alone), else hidden's."""
    kind = hidden.device.type
    if hidden.dtype is not torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _choose(head: Head, criterion: Criterion, reduction: str, backend: str) -> Backend:
    try:
        asked = Backend(backend)
    except ValueError:
        raise ArgumentError(f"backend={show_value(backend)} is unknown; there are: {', '.join(Backend)}") from None
    if asked in (Backend.TILED, Backend.NATIVE):
        return asked
    needs_grad = torch.is_grad_enabled()
    wanted = Wanted(
        hidden=needs_grad and head.hidden.requires_grad,
        weight=needs_grad and head.weight.requires_grad,
        bias=needs_grad and head.bias is not None and head.bias.requires_grad,
    )
    reason = liger.obstacle(head, criterion, reduction=reduction, wanted=wanted)
    (tokens, width), vocabulary = head.hidden.shape, head.weight.shape[0]
    if reason is None and asked is Backend.AUTO:
        # What is forecast is what tiles take; Liger's logits grow, to 16 GiB for two million tokens of a Llama.
        taken = liger.chunk_bytes(tokens, width, vocabulary, head.compute)
        reason = _MORE if taken > tiles.largest_bytes(vocabulary, head.compute) else None
    if reason is None:
        return Backend.LIGER
    if asked is Backend.LIGER:
        raise LossBackendError(f"backend='liger' cannot compute this loss: {reason}; 'tiled' can")
    _say_why_tiled(reason)
    return Backend.TILED


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _say_why_tiled(reason: str) -> None:
    _log_once(reason)


@cache
def _log_once(reason: str) -> None:
    logger.info("head and loss run by this package's own tiles, not by liger: %s", reason)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: _Call) -> Tensor:
    check_classes(target, weight.shape[0], call.criterion.ignore_index)
    loss: Tensor = _HeadLoss.apply(hidden, weight, bias, target, call)  # type: ignore[no-untyped-call]
    return loss


def _native(head: Head, criterion: Criterion, reduction: str, num_items: Tensor | float | None) -> Tensor:
    check_one_dtype(head)
    logits = functional.linear(head.hidden, head.weight, head.bias).to(head.accumulate)
    logits = logits * criterion.logit_scale
    if criterion.softcap is not None:
        logits = torch.tanh(logits / criterion.softcap) * criterion.softcap
    try:
        loss = functional.cross_entropy(
            logits,
            head.target,
            ignore_index=criterion.ignore_index,
            reduction="sum" if num_items is not None else reduction,
            label_smoothing=criterion.label_smoothing,
        )
    except IndexError:
        check_classes(head.target, head.weight.shape[0], criterion.ignore_index)
        raise
    return loss if num_items is None else loss / _as_divisor(num_items, loss)


def _as_divisor(num_items: Tensor | float, like: Tensor) -> Tensor | float:
    if isinstance(num_items, Tensor):
        return num_items.reshape(()).to(device=like.device, dtype=like.dtype, non_blocking=True)
    return num_items


class _HeadLoss(torch.autograd.Function):
    """hidden [T, D], weight [V, D], bias [V] or None, target [T] -> loss [] or [T]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: _Call) -> Tensor:
        head = Head(hidden=hidden, weight=weight, bias=bias, target=target, compute=call.compute)
        needs = ctx.needs_input_grad
        wanted = Wanted(hidden=needs[0], weight=needs[1], bias=bias is not None and needs[2])
        ctx.call, ctx.wanted = call, wanted
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        if call.backend is Backend.LIGER:
            # Liger is written for the ambient autocast; our tiles cast for themselves.
            loss, gradients, later = _liger_loss(head, call, wanted)
        else:
            with torch.autocast(hidden.device.type, enabled=False):
                if call.reduction == "none":
                    losses, _ = tiles.evaluate(head, call.criterion, tile=call.tile, wanted=Wanted(), row_scale=None)
                    ctx.save_for_backward(hidden, weight, bias, target)
                    return losses
                loss, gradients, later = _tiled_loss(head, call, wanted)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias, later)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Without this the gradients would silently count as constants in the second derivative.
            raise LossBackendError(
                "linear_cross_entropy has no second derivative (create_graph=True); backend='native' has"
            )
        call, wanted = ctx.call, ctx.wanted
        with torch.autocast(grad_output.device.type, enabled=False):
            if call.reduction == "none":
                hidden, weight, bias, target = ctx.saved_tensors
                head = Head(hidden=hidden, weight=weight, bias=bias, target=target, compute=call.compute)
                losses = grad_output.to(head.accumulate)
                _, made = tiles.evaluate(head, call.criterion, tile=call.tile, wanted=wanted, row_scale=losses)
                parts = (made.hidden, made.weight, made.bias)
                grads = [
                    None if part is None else part.to(dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True)
                ]
            else:
                *saved, later = ctx.saved_tensors
                scale = grad_output if later is None else grad_output * later
                grads = [
                    None if part is None else _scaled(part, scale, dtype)
                    for part, dtype in zip(saved, ctx.dtypes, strict=True)
                ]
        return (*grads, None, None)


def _tiled_loss(head: Head, call: _Call, wanted: Wanted) -> tuple[Tensor, Gradients, Tensor | None]:
    """Loss, gradients, and the factor that the gradients still lack (None: none)."""
    factor = _factor(head, call)
    folded = head.compute is not torch.float16
    one = torch.ones((), dtype=head.accumulate, device=head.hidden.device)
    losses, gradients = tiles.evaluate(
        head,
        call.criterion,
        tile=call.tile,
        wanted=wanted,
        row_scale=(factor if folded else one).expand(head.hidden.shape[0]),
    )
    total = losses.sum()
    if call.num_items is not None:
        total = total / _as_divisor(call.num_items, total)
    elif call.reduction == "mean":
        total = total / (head.target != call.criterion.ignore_index).sum()
    # A mean of nothing is nan, but its gradient is 0, as PyTorch's is: 0 * inf would make it nan.
    later = None if folded else torch.where(factor.isfinite(), factor, 0.0)
    return total, gradients, later


def _liger_loss(head: Head, call: _Call, wanted: Wanted) -> tuple[Tensor, Gradients, Tensor | None]:
    if call.num_items is not None:
        # From the sum, and divided in backward: p - 1 near -1 is exact in bf16, (p - 1) / count is not.
        loss, gradients = liger.evaluate(head, call.criterion, reduction="sum", wanted=wanted)
        return loss / _as_divisor(call.num_items, loss), gradients, _factor(head, call)
    loss, gradients = liger.evaluate(head, call.criterion, reduction=call.reduction, wanted=wanted)
    if call.reduction == "mean":
        # Liger's mean of nothing is 0, PyTorch's is nan: add 0 or nan, without reading the count.
        count = (head.target != call.criterion.ignore_index).sum()
        loss = loss + (count / count - 1.0)
    return loss, gradients, None


def _factor(head: Head, call: _Call) -> Tensor:
    """What the sum of losses is multiplied by, a 0-dim tensor on the device."""
    one = torch.ones((), dtype=head.accumulate, device=head.hidden.device)
    if call.num_items is not None:
        return one / _as_divisor(call.num_items, one)
    if call.reduction == "mean":
        return one / (head.target != call.criterion.ignore_index).sum()
    return one


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * scale`` in ``dtype``, rounded once; in place when this backward is the last one."""
    # One dimension, not none: a 0-dim factor would first be rounded to the gradient's dtype.
    factor = scale.reshape(1)
    if gradient.dtype == dtype and not torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
