"""MEMO's closed form for its single swap fraction (arXiv 2407.12117, section 4.1).

    max alpha   s.t.   (S_fixed + alpha * S_token) / B <= T_layer          the link keeps up with one layer
                       sum over swapped blocks of the same <= M_host       host memory
                       0 <= alpha <= 1

S_fixed is what is swapped whole (the paper's S_input + S_attn), S_token what alpha scales (S_others), B the
link in bytes per second, T_layer the forward of one layer. Backward takes about twice as long, so the way
back is taken as hidden; recompute time is not in the objective. Sizes in bytes, times in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapDemand:
    """What swapping one block moves: ``fixed_bytes`` at alpha 0, ``token_bytes`` more at alpha 1."""

    fixed_bytes: float
    token_bytes: float
    forward_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoAlpha:
    """The closed form's result and the two bounds that made it, before clipping to [0, 1].

    ``fits_host`` is False where even alpha = 0 needs more than the host has.
    """

    alpha: float
    by_link: float
    by_host: float
    fits_host: bool

    @property
    def binding(self) -> str:
        """Which bound decided."""
        if self.alpha >= 1.0:
            return "nothing binds"
        return "the link binds" if self.by_link <= self.by_host else "host memory binds"


def memo_alpha(blocks: Sequence[SwapDemand], *, to_host_rate: float, host_bytes: float) -> MemoAlpha:
    """The largest fraction that the link hides behind every block's forward and that the host holds.

    Args:
        blocks: the swapped blocks (the paper's first n - 2). Sizes and rates of one device go together, and
            ``host_bytes`` is the share of the host that these blocks may use.
        to_host_rate: bytes per second; 0 means not measured, which bounds nothing.
        host_bytes: host capacity.
    """
    unbounded = float("inf")
    by_link = min(
        (_bound(to_host_rate * block.forward_seconds, block.fixed_bytes, block.token_bytes) for block in blocks),
        default=unbounded,
    )
    fixed = sum(block.fixed_bytes for block in blocks)
    by_host = _bound(host_bytes, fixed, sum(block.token_bytes for block in blocks))
    if to_host_rate <= 0:
        by_link = unbounded
    return MemoAlpha(
        alpha=min(1.0, max(0.0, min(by_link, by_host))),
        by_link=by_link,
        by_host=by_host,
        fits_host=fixed <= host_bytes,
    )


def _bound(capacity: float, fixed: float, scaled: float) -> float:
    """Largest alpha with ``fixed + alpha * scaled <= capacity``."""
    if scaled <= 0:
        return float("inf") if fixed <= capacity else float("-inf")
    return (capacity - fixed) / scaled


def crossover_tokens(alpha: float, flops_per_byte: float, hidden_size: int) -> float:
    """Length from which swapping fraction ``alpha`` of a causal GPT layer hides behind its forward.

    From 2 b s h (2 + 14 alpha) bytes at B against 24 b s h^2 + 2 b s^2 h FLOPs at F: s = (2 + 14 alpha) F / B
    - 12 h (our arithmetic on the paper's table 1). ``flops_per_byte`` is F / B, both as achieved by one
    device.
    """
    return (2 + 14 * alpha) * flops_per_byte - 12 * hidden_size
