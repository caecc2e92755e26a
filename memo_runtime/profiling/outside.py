"""What lies outside the blocks: the final norm, the head and the loss, estimated from the model's shape.

These are estimates until a step was seen; the plan says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from memo_runtime.records import BlockProfile, Growth

#: Copies of the last hidden state alive at once around the final norm and the loss: the state itself, its gradient,
#: and the float32 copies (twice the bytes each) that norms of half-precision models make.
_HIDDEN_COPIES = {2: 9, 4: 5, 8: 5}
#: Bytes of one tile of logits with its gradient, when the loss runs by tiles.
_TILE_BYTES = 512 * 1024**2


def _head_features(model: nn.Module, profiles: Sequence[BlockProfile]) -> int:
    """Output features of the linear heads outside the blocks."""
    inside = tuple(profile.name + "." for profile in profiles)
    return sum(
        module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(inside)
    )


def outside_peak(
    model: nn.Module, profiles: Sequence[BlockProfile], rows: int, hidden_bytes: int, *, tiled_loss: bool
) -> Growth:
    """Device bytes that head and loss need beyond what the blocks keep, by tokens."""
    last = profiles[-1]
    tokens = max(1, last.tokens)
    parameter = next(model.parameters(), torch.empty(0))
    item = parameter.element_size()
    per_token = hidden_bytes * _HIDDEN_COPIES.get(item, 5) / tokens
    if tiled_loss:
        return Growth(constant=_TILE_BYTES if parameter.device.type == "cuda" else 0, linear=per_token)
    # Logits in the model's dtype, in float32 as losses take them, and the gradients of both.
    return Growth(linear=per_token + rows * _head_features(model, profiles) * 2 * (item + 4))


def outside_seconds(model: nn.Module, profiles: Sequence[BlockProfile], rows: int) -> Growth:
    """Seconds of the head, forward and backward, at the rate that the blocks' own products reached."""
    timed = [p for p in profiles if p.timed_tokens and p.forward_seconds.exact(p.timed_tokens) > 0]
    if not timed:
        return Growth()
    flops = timed[0].forward_flops.exact(timed[0].timed_tokens)
    seconds = timed[0].forward_seconds.exact(timed[0].timed_tokens)
    inside = tuple(profile.name + "." for profile in profiles)
    weights = sum(
        module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(inside)
    )
    return Growth(linear=6 * rows * weights * seconds / max(flops, 1.0))
