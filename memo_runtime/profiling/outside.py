"""What lies outside the blocks: the final norm, the head and the loss, estimated from the model's shape.

These are estimates until a step was seen; the plan says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from memo_runtime.records import BlockProfile, Growth

#: Copies of the last hidden state alive at once around the final norm and the loss: the state itself, its gradient,
#: and the float32 copies (twice the bytes each) that norms of half-precision models make.
_HIDDEN_COPIES = {2: 9, 4: 5, 8: 5}
#: Where nothing with weights follows the blocks: the state and its gradient.
_BARE_COPIES = 2
#: Bytes of one tile of logits with its gradient, when the loss runs by tiles.
_TILE_BYTES = 512 * 1024**2


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
    """Device bytes that head and loss need beyond what the blocks keep, by tokens."""
    last = profiles[-1]
    tokens = max(1, last.tokens)
    parameter = next(model.parameters(), torch.empty(0))
    item = parameter.element_size()
    copies = _BARE_COPIES if _is_bare(model, profiles) else _HIDDEN_COPIES.get(item, 5)
    per_token = hidden_bytes * copies / tokens
    if copies == _BARE_COPIES:
        return Growth(linear=per_token)
    if tiled_loss:
        return Growth(constant=_TILE_BYTES if parameter.device.type == "cuda" else 0, linear=per_token)
    features = sum(head.out_features for head in _heads(model, profiles))
    # Logits in the model's dtype, in float32 as losses take them, and the gradients of both.
    return Growth(linear=per_token + rows * features * 2 * (item + 4))


def outside_seconds(model: nn.Module, profiles: Sequence[BlockProfile], rows: int) -> Growth:
    """Seconds of the head, forward and backward, at the rate that the blocks' own products reached."""
    timed = [p for p in profiles if p.timed_tokens and p.forward_seconds.exact(p.timed_tokens) > 0]
    if not timed:
        return Growth()
    flops = timed[0].forward_flops.exact(timed[0].timed_tokens)
    seconds = timed[0].forward_seconds.exact(timed[0].timed_tokens)
    weights = sum(head.in_features * head.out_features for head in _heads(model, profiles))
    return Growth(linear=6 * rows * weights * seconds / max(flops, 1.0))
