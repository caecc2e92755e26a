"""What lies outside the blocks: the final norm, the head and the loss.

Their bytes are estimated from the model's shape until a step was seen; the plan says so. What they take in time is in
``outside_time.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.final_norm import LONG_BYTES, can_run_by_tiles, final_norm
from memo_runtime.losses import tiles
from memo_runtime.records import BlockProfile, Growth, LongEnd
from memo_runtime.sizes import NORM_TILE

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


def around_blocks(model: nn.Module, profiles: Sequence[BlockProfile]) -> Iterator[nn.Module]:
    """Modules of ``model`` that belong to no block."""
    inside = tuple(profile.name + "." for profile in profiles)
    return (module for name, module in model.named_modules() if not f"{name}.".startswith(inside))


def _is_bare(model: nn.Module, profiles: Sequence[BlockProfile]) -> bool:
    """Whether the model is its blocks and embeddings alone: no final norm, no head."""
    return all(
        isinstance(module, nn.Embedding) or next(module.parameters(recurse=False), None) is None
        for module in around_blocks(model, profiles)
    )


def heads_of(model: nn.Module, profiles: Sequence[BlockProfile]) -> Iterator[nn.Linear]:
    """Linear modules outside the blocks."""
    return (module for module in around_blocks(model, profiles) if isinstance(module, nn.Linear))


def end_of(
    model: nn.Module, profiles: Sequence[BlockProfile], rows: int, hidden_bytes: int, *, tiled_loss: bool, held: int = 0
) -> dict[str, Any]:
    """``outside_peak``, ``loss_peak`` and ``long_end`` of a profile; ``held``: bytes that are there with the first."""

    def end(*, by_tiles: bool) -> tuple[Growth, Growth]:
        behind = outside_peak(model, profiles, rows, hidden_bytes, tiled_loss=tiled_loss, by_tiles=by_tiles)
        before = loss_peak(model, profiles, hidden_bytes, by_tiles=by_tiles) if tiled_loss else Growth()
        return replace(behind, constant=behind.constant + held), before

    long_end = None
    norm = final_norm(model, [profile.name for profile in profiles])
    if norm is not None and can_run_by_tiles(norm) and hidden_bytes:
        tokens = -(-LONG_BYTES * max(1, profiles[-1].tokens) // hidden_bytes)
        behind, before = end(by_tiles=True)
        long_end = LongEnd(tokens=tokens, outside_peak=behind, loss_peak=before)
    behind, before = end(by_tiles=False)
    return {"outside_peak": behind, "loss_peak": before, "long_end": long_end}


def outside_peak(
    model: nn.Module,
    profiles: Sequence[BlockProfile],
    rows: int,
    hidden_bytes: int,
    *,
    tiled_loss: bool,
    by_tiles: bool = False,
) -> Growth:
    """Device bytes that head and loss need beyond what the blocks keep and their own gradients, by tokens.

    ``by_tiles``: so runs the norm behind the blocks.
    """
    last = profiles[-1]
    tokens = max(1, last.tokens)
    parameter = next(model.parameters(), torch.empty(0))
    item = parameter.element_size()
    heads = list(heads_of(model, profiles))
    # Without a head the caller gives the norm its gradient, and holds it.
    copies = _BARE_COPIES if _is_bare(model, profiles) else _HIDDEN_COPIES.get(item, 4) + (not heads)
    constant = 0.0
    if by_tiles:
        copies, constant = _TILED_COPIES, hidden_bytes * _TILE_COPIES / tokens * NORM_TILE
    per_token = hidden_bytes * copies / tokens
    if copies == _BARE_COPIES or tiled_loss:
        return Growth(constant=constant, linear=per_token)
    features = sum(head.out_features for head in heads)
    # Logits in the model's dtype, in float32 as losses take them, and the gradients of both.
    return Growth(constant=constant, linear=per_token + rows * features * 2 * (item + 4))


def loss_peak(
    model: nn.Module, profiles: Sequence[BlockProfile], hidden_bytes: int, *, by_tiles: bool = False
) -> Growth:
    """Device bytes that they need by tiles before any gradient is there: one tile, and the head's gradient as it grows.

    That gradient is a sum in float32 and stands beside its copy in the weight's dtype for a moment.
    """
    heads = list(heads_of(model, profiles))
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
    logits = sum(rows * head.out_features * head.weight.element_size() for head in heads_of(model, profiles))
    return Growth(linear=max(per_token, float(logits)))
