"""Cross entropy of a linear head, tile by tile: the arithmetic, without autograd.

The logits of T tokens are never one tensor. Two nested runs of tokens keep the two costs apart:

    tile  [tile, V]   compute dtype   one matmul in, two matmuls out (dX, dW += ...)   bounded by TILE_BYTES
    rows  [rows, V]   float32         the softmax of a few rows at a time              bounded by ROWS_BYTES

A tile wants to be large, because every tile reads and writes all of dW [V, D] in float32: with t tokens that
traffic is about 8*V*D bytes for 2*t*V*D FLOPs, so on an H100 (3.35 TB/s, 700 TFLOP/s) it takes 80 % of that
matmul's time at 1,024 tokens and 20 % at 4,096. The softmax wants to be small, because it is float32 and needs
temporaries. So the rows of a tile are upcast in pieces, and what they leave in the tile, in place of the
logits, is the gradient of the loss by the logits, which is what the two matmuls read next. docs/losses.md has
the measurements behind the two sizes.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Bytes of one tile's logits, in the compute dtype. On a CPU memory is cheap but caches are small.
TILE_BYTES = {"cuda": 1 << 29, "cpu": 1 << 28}

#: Bytes of one float32 temporary of the softmax; up to four are alive (with a cap; two without).
ROWS_BYTES = {"cuda": 1 << 27, "cpu": 1 << 23}

#: Tiles of more than this many tokens are whole multiples of it: matmuls like it.
TILE_MULTIPLE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """What happens between the head's output and the loss of one token.

    Attributes:
        ignore_index: targets with this value have loss 0 and no gradient.
        logit_scale: the logits are multiplied by it, before the cap.
        softcap: ``c`` in ``c * tanh(logits / c)``; ``None`` is no cap.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``, in [0, 1].
    """

    ignore_index: int = -100
    logit_scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The operands: hidden [T, D], weight [V, D], bias [V] or None, target [T] int64.

    ``compute`` is the dtype of the matmuls: the operands' own, or autocast's.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    compute: torch.dtype

    @property
    def accumulate(self) -> torch.dtype:
        """Dtype of the softmax, of the loss and of the sums over tiles: float32, or float64 for float64."""
        return torch.float64 if self.compute is torch.float64 else torch.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which gradients to make."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(slots=True, kw_only=True)
class Gradients:
    """hidden [T, D] in the hidden dtype; weight [V, D] and bias [V] in the accumulation dtype."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


def tile_tokens(tokens: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of one tile, at least 1: what fits ``TILE_BYTES``, spread evenly over the tiles."""
    limit = TILE_BYTES.get(device.type, TILE_BYTES["cuda"])
    most = max(1, limit // (vocabulary * dtype.itemsize))
    if tokens <= most:
        return max(1, tokens)
    if most < TILE_MULTIPLE:
        return most
    most -= most % TILE_MULTIPLE
    even = -(-tokens // -(-tokens // most))
    return -(-even // TILE_MULTIPLE) * TILE_MULTIPLE


def largest_bytes(vocabulary: int, dtype: torch.dtype) -> int:
    """Most bytes on a GPU of a tile's logits and of the softmax, whose rows are there as they are and as logarithms."""
    whole = torch.device("cuda")
    tile = tile_tokens(1 << 40, vocabulary, dtype, whole) * vocabulary * dtype.itemsize
    wide = max(4, dtype.itemsize)
    return tile + 2 * max(1, ROWS_BYTES["cuda"] // (vocabulary * wide)) * vocabulary * wide


def evaluate(
    head: Head, criterion: Criterion, *, tile: int, wanted: Wanted, row_scale: Tensor | None
) -> tuple[Tensor, Gradients]:
    """Loss of every token, and the gradients of ``sum(row_scale * losses)``.

    Args:
        head: the operands.
        criterion: from logits to loss.
        tile: tokens per tile, at least 1.
        wanted: gradients to make; with none, ``row_scale`` is not read.
        row_scale: [T] in the accumulation dtype; rows of ignored targets may hold anything, inf included.

    Returns:
        losses [T] in the accumulation dtype (0 where ignored), and the gradients.
    """
    tokens, vocabulary = head.hidden.shape[0], head.weight.shape[0]
    weight = head.weight.to(head.compute)
    bias = None if head.bias is None else head.bias.to(head.compute)
    losses = torch.empty(tokens, dtype=head.accumulate, device=head.hidden.device)
    gradients = _empty_gradients(head, wanted)
    buffer = head.hidden.new_empty((min(tile, max(tokens, 1)), vocabulary), dtype=head.compute)
    rows = _softmax_rows(vocabulary, head)
    for start in range(0, tokens, tile):
        stop = min(start + tile, tokens)
        hidden = head.hidden[start:stop].to(head.compute)
        logits = buffer[: stop - start]
        if bias is None:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden, weight.t(), out=logits)
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            losses[first:last] = _rows_loss(
                logits[first - start : last - start],
                head.target[first:last],
                row_scale[first:last] if wanted and row_scale is not None else None,
                criterion,
            )
        if wanted:
            _add_tile(gradients, slice(start, stop), hidden, logits, weight)
    return losses, gradients


def _softmax_rows(vocabulary: int, head: Head) -> int:
    limit = ROWS_BYTES.get(head.hidden.device.type, ROWS_BYTES["cuda"])
    return max(1, limit // (vocabulary * head.accumulate.itemsize))


def _empty_gradients(head: Head, wanted: Wanted) -> Gradients:
    gradients = Gradients()
    if wanted.hidden:
        gradients.hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format)
    if wanted.weight:
        gradients.weight = torch.zeros(head.weight.shape, dtype=head.accumulate, device=head.weight.device)
    if wanted.bias:
        assert head.bias is not None, "a gradient was asked for a bias that there is not"
        gradients.bias = torch.zeros_like(head.bias, dtype=head.accumulate)
    return gradients


def _rows_loss(logits: Tensor, target: Tensor, row_scale: Tensor | None, criterion: Criterion) -> Tensor:
    """Losses of some rows; with ``row_scale``, ``logits`` becomes the gradient by the head's output.

    ``logits`` [r, V] is the head's output, in the compute dtype, and is overwritten; ``target`` [r].
    """
    accumulate = torch.float64 if logits.dtype is torch.float64 else torch.float32
    valid = target != criterion.ignore_index
    # Out-of-range targets stay as they are, so that gather reports them as F.cross_entropy would.
    index = torch.where(valid, target, 0).unsqueeze(1)
    scores, slope = _scores(logits, criterion, accumulate)
    log_p = torch.log_softmax(scores, dim=1, dtype=accumulate)
    del scores
    picked = log_p.gather(1, index)
    loss = -picked.squeeze(1)
    smoothing, share = criterion.label_smoothing, criterion.label_smoothing / logits.shape[1]
    if smoothing:
        loss = (1.0 - smoothing) * loss - share * log_p.sum(dim=1)
    loss = torch.where(valid, loss, 0.0)
    if row_scale is None:
        return loss
    gradient = log_p.exp_()
    # Written, not added: scatter_add_ is not deterministic on CUDA.
    at_target = torch.expm1(picked)
    if smoothing:
        gradient.sub_(share)
        at_target = at_target + (smoothing - share)
    gradient.scatter_(1, index, at_target)
    if slope is not None:
        gradient.mul_(slope)
    # `where`, not a product with the mask: 1 / count is inf when every target is ignored.
    scale = torch.where(valid, row_scale * criterion.logit_scale, 0.0).unsqueeze(1)
    torch.mul(gradient, scale, out=logits)
    return loss


def _scores(logits: Tensor, criterion: Criterion, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """What goes into the softmax, and the cap's derivative by what goes into the cap."""
    if criterion.logit_scale == 1.0 and criterion.softcap is None:
        return logits, None  # log_softmax converts in its own kernel
    scores = logits.to(dtype) * criterion.logit_scale
    if criterion.softcap is None:
        return scores, None
    capped = scores.div_(criterion.softcap).tanh_()
    slope = torch.addcmul(torch.ones((), dtype=dtype, device=logits.device), capped, capped, value=-1.0)
    return capped.mul_(criterion.softcap), slope


def _add_tile(gradients: Gradients, rows: slice, hidden: Tensor, by_logits: Tensor, weight: Tensor) -> None:
    if gradients.hidden is not None:
        if by_logits.itemsize == 2 and _has_wide_matmul(by_logits):
            # A sum over the vocabulary: cuBLAS may split it and add the parts in half precision.
            gradients.hidden[rows] = torch.mm(by_logits, weight, out_dtype=torch.float32)
        elif gradients.hidden.dtype == by_logits.dtype:
            torch.mm(by_logits, weight, out=gradients.hidden[rows])
        else:
            gradients.hidden[rows] = by_logits @ weight
    if gradients.weight is not None:
        _add_product(gradients.weight, by_logits.t(), hidden)
    if gradients.bias is not None:
        gradients.bias += by_logits.sum(dim=0, dtype=gradients.bias.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` with the sum in total's dtype, whatever the factors' is.

    Adding bf16 partial products instead loses up to 8 bits over many tiles; see docs/losses.md.
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif _has_wide_matmul(left):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _has_wide_matmul(factor: Tensor) -> bool:
    """Whether a matmul of half-precision factors can have a float32 result: CUDA only, from torch 2.11 on."""
    return factor.is_cuda and torch.version.hip is None
