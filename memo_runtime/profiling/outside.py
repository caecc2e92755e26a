"""What lies outside the blocks: the final norm, the head and the loss.

Their bytes are estimated from the model's shape until a step was seen; the plan says so. Their time is measured where
the runtime itself runs them, by tiles.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.final_norm import LONG_BYTES, final_norm
from memo_runtime.blocks.stopwatch import typical
from memo_runtime.losses import liger, linear_cross_entropy, tiles
from memo_runtime.profiling.growth import fit_seconds, times
from memo_runtime.records import BlockProfile, Growth
from memo_runtime.sizes import NORM_TILE

logger = logging.getLogger("memo_runtime")

#: Copies of the last hidden state alive at once while the final norm goes backward: the state, gradients, and the
#: float32 copies (twice the bytes each) that norms of half-precision models make. Counted for Hugging Face's RMSNorm,
#: which takes the most (tests/profiling/test_outside.py), behind a head, whose gradient goes when the norm has read it.
_HIDDEN_COPIES = {2: 12, 4: 6, 8: 6}
#: While the loss runs forward: what that norm saves, its result, and the gradient that the loss makes at once.
_LOSS_COPIES = {2: 5, 4: 4, 8: 4}
#: The same by tiles (``execution/norm.py``): the state, the result and their gradients; and for each token of a tile.
_TILED_COPIES, _TILED_LOSS_COPIES, _TILE_COPIES = 4, 3, 16
#: Where nothing with weights follows the blocks: the state and its gradient.
_BARE_COPIES = 2
#: Most tokens on which head and loss are timed.
_HEAD_TOKENS = {"cuda": 8192, "cpu": 256}


def _around(model: nn.Module, profiles: Sequence[BlockProfile]) -> Iterator[nn.Module]:
    """Modules of ``model`` that belong to no block."""
    inside = tuple(profile.name + "." for profile in profiles)
    return (module for name, module in model.named_modules() if not f"{name}.".startswith(inside))


def _is_bare(model: nn.Module, profiles: Sequence[BlockProfile]) -> bool:
    """Whether the model is its blocks and embeddings alone: no final norm, no head."""
    return all(
        isinstance(module, nn.Embedding) or next(module.parameters(recurse=False), None) is None
        for module in _around(model, profiles)
    )


def _heads(model: nn.Module, profiles: Sequence[BlockProfile]) -> Iterator[nn.Linear]:
    """Linear modules outside the blocks."""
    return (module for module in _around(model, profiles) if isinstance(module, nn.Linear))


def outside_peak(
    model: nn.Module, profiles: Sequence[BlockProfile], rows: int, hidden_bytes: int, *, tiled_loss: bool
) -> Growth:
    """Device bytes that head and loss need beyond what the blocks keep and their own gradients, by tokens."""
    last = profiles[-1]
    tokens = max(1, last.tokens)
    parameter = next(model.parameters(), torch.empty(0))
    item = parameter.element_size()
    heads = list(_heads(model, profiles))
    # Without a head the caller gives the norm its gradient, and holds it.
    copies = _BARE_COPIES if _is_bare(model, profiles) else _HIDDEN_COPIES.get(item, 4) + (not heads)
    constant = 0.0
    if _norm_by_tiles(model, profiles, hidden_bytes):
        copies, constant = _TILED_COPIES, hidden_bytes * _TILE_COPIES / tokens * NORM_TILE
    per_token = hidden_bytes * copies / tokens
    if copies == _BARE_COPIES or tiled_loss:
        return Growth(constant=constant, linear=per_token)
    features = sum(head.out_features for head in heads)
    # Logits in the model's dtype, in float32 as losses take them, and the gradients of both.
    return Growth(constant=constant, linear=per_token + rows * features * 2 * (item + 4))


def _norm_by_tiles(model: nn.Module, profiles: Sequence[BlockProfile], hidden_bytes: int) -> bool:
    """The norm behind the blocks sees a state that is long enough."""
    return hidden_bytes >= LONG_BYTES and final_norm(model, [profile.name for profile in profiles]) is not None


def loss_peak(model: nn.Module, profiles: Sequence[BlockProfile], hidden_bytes: int) -> Growth:
    """Device bytes that they need by tiles before any gradient is there: one tile, and the head's gradient as it grows.

    That gradient is a sum in float32 and stands beside its copy in the weight's dtype for a moment.
    """
    heads = list(_heads(model, profiles))
    if not heads:
        return Growth()
    head = max(heads, key=lambda linear: linear.out_features)
    dtype = head.weight.dtype
    constant = tiles.largest_bytes(head.out_features, dtype)
    if head.weight.requires_grad:
        growing = head.weight.numel() * max(4, dtype.itemsize)
        done = head.weight.numel() * dtype.itemsize if dtype.itemsize < 4 else 0
        constant = growing + max(constant, done)
    tokens = max(1, profiles[-1].tokens)
    by_tiles = _norm_by_tiles(model, profiles, hidden_bytes)
    copies = _TILED_LOSS_COPIES if by_tiles else _LOSS_COPIES.get(dtype.itemsize, 4)
    return Growth(constant=constant, linear=hidden_bytes * copies / tokens)


def result_bytes(
    model: nn.Module, profiles: Sequence[BlockProfile], rows: int, per_token: float, *, tiled_loss: bool
) -> Growth:
    """Device bytes of what the model returns, by tokens: a variable of the training loop mostly has it to the end.

    Logits where the loss does not run by tiles, else a number; hidden states, of ``per_token`` bytes, where there is no
    head. A linear module outside the blocks need not be one: where its logits would be less, states are counted.
    """
    if tiled_loss:
        return Growth()
    logits = sum(rows * head.out_features * head.weight.element_size() for head in _heads(model, profiles))
    return Growth(linear=max(per_token, float(logits)))


def outside_seconds(
    model: nn.Module, profiles: Sequence[BlockProfile], rows: int, hidden: torch.Tensor | None, *, tiled_loss: bool
) -> Growth:
    """Seconds of the head and loss, forward and backward, by tokens.

    By tiles they are timed, on as many tokens as ``hidden``, the input of the first block, has at most; otherwise the
    head is taken to run at the rate that the blocks' own products reached.
    """
    heads = list(_heads(model, profiles))
    if tiled_loss and heads and hidden is not None:
        head = max(heads, key=lambda linear: linear.out_features)
        measured = _time_tiles(head, rows, hidden)
        if measured is not None:
            return measured
    timed = [p for p in profiles if p.timed_tokens and p.forward_seconds.exact(p.timed_tokens) > 0]
    if not timed:
        return Growth()
    flops = timed[0].forward_flops.exact(timed[0].timed_tokens)
    seconds = timed[0].forward_seconds.exact(timed[0].timed_tokens)
    weights = sum(head.in_features * head.out_features for head in heads)
    return Growth(linear=6 * rows * weights * seconds / max(flops, 1.0))


def _time_tiles(head: nn.Linear, rows: int, like: torch.Tensor) -> Growth | None:
    """Seconds by tokens of one of ``rows`` sequences; None where the head cannot be run alone."""
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    # Sharded, freed or quantised weights are none that can be multiplied with.
    usable = (
        not hasattr(weight, "_local_tensor")
        and weight.is_floating_point()
        and tuple(weight.shape) == (head.out_features, like.shape[-1])
        and weight.untyped_storage().nbytes() > 0
        and weight.device == like.device
    )
    if not usable:
        return None
    weight.requires_grad_(head.weight.requires_grad)
    # Whoever runs it at the whole length: a short one may be another's.
    at_once = (like.numel() // head.in_features, head.in_features, head.out_features, weight.dtype)
    backend = "auto" if liger.chunk_bytes(*at_once) <= tiles.largest_bytes(*at_once[2:]) else "tiled"
    most = min(_HEAD_TOKENS.get(like.device.type, _HEAD_TOKENS["cpu"]), like.numel() // head.in_features)
    points = []
    for tokens in sorted({max(1, most // 2), most}):
        hidden = like.reshape(-1, head.in_features)[:tokens].to(weight.dtype, copy=True).requires_grad_()
        target = torch.zeros(tokens, dtype=torch.int64, device=like.device)
        wanted = [tensor for tensor in (hidden, weight) if tensor.requires_grad]

        def run(hidden: torch.Tensor = hidden, target: torch.Tensor = target, wanted: Any = wanted) -> None:
            torch.autograd.grad(linear_cross_entropy(hidden, weight, target, bias=bias, backend=backend), wanted)

        try:
            with torch.enable_grad():
                found = typical([run], like.device)
        except (RuntimeError, ValueError, TypeError) as error:
            # No room for it beside the model, or a head that only its own model calls as it wants.
            logger.info("memo: the time of head and loss is estimated from their FLOPs: %s", error)
            return None
        points.append((tokens, found[0]))
    return times(fit_seconds(points, curved=False), Fraction(rows))
