"""What a user asks of ``memo.wrap``: the policy and the settings, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from memo_runtime.units import parse_bytes


class Policy(StrEnum):
    """How activations are handled; ``memo`` is the paper's single swap fraction."""

    AUTO = "auto"
    NONE = "none"
    MEMO = "memo"
    SWAP = "swap"
    RECOMPUTE = "recompute"
    REPLAY = "replay"
    TILED = "tiled"


class Layout(StrEnum):
    """Where transient tensors are placed: by the plan, or by PyTorch's own allocator."""

    AUTO = "auto"
    PLANNED = "planned"
    NATIVE = "native"


class Loss(StrEnum):
    """Whether the head and loss of a Hugging Face causal LM run by tiles."""

    AUTO = "auto"
    TILED = "tiled"
    NATIVE = "native"


#: Policies that fix the swap fraction; ``memo``, ``replay`` and ``tiled`` also take one from the user.
FIXED_ALPHA = {Policy.SWAP: 1.0, Policy.RECOMPUTE: 0.0}
_TAKES_ALPHA = (Policy.MEMO, Policy.REPLAY, Policy.TILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The knobs of a plan.

    Attributes:
        policy: how activations are handled.
        alpha: swap fraction in [0, 1] for ``memo``, ``replay`` and ``tiled``; ``None`` lets the planner choose.
        budget: bound on ``torch.cuda.max_memory_allocated`` in bytes; ``None`` is the device's free memory.
        host_budget: bound on host (pinned) bytes; ``None`` is the detected limit.
        keep_last: blocks at the end of each stack whose activations stay on the device; ``None``: planned.
        strict: a block that cannot take the policy is an error instead of a warning.
    """

    policy: Policy = Policy.AUTO
    alpha: float | None = None
    budget: int | None = None
    host_budget: int | None = None
    keep_last: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.alpha is not None:
            if self.policy not in _TAKES_ALPHA:
                takers = ", ".join(_TAKES_ALPHA)
                raise ValueError(f"alpha={self.alpha} goes with policy {takers}; policy is '{self.policy}'")
            if not 0.0 <= self.alpha <= 1.0:
                raise ValueError(f"alpha={self.alpha} is not a fraction: give 0 (recompute) to 1 (swap)")
        if self.keep_last is not None and (isinstance(self.keep_last, bool) or self.keep_last < 0):
            raise ValueError(f"keep_last={self.keep_last!r} is not a number of blocks: give 0 or more")


def make_settings(
    *,
    policy: str = "auto",
    alpha: float | None = None,
    budget: int | str | None = None,
    host_budget: int | str | None = None,
    keep_last: int | None = None,
    strict: bool = False,
) -> Settings:
    """``Settings`` from what users write: names of policies, sizes as text.

    Raises:
        ValueError: an unknown policy, a size that is none, or knobs that do not go together.
    """
    try:
        chosen = Policy(policy)
    except ValueError:
        raise ValueError(f"policy={policy!r} is unknown; there are: {', '.join(Policy)}") from None
    return Settings(
        policy=chosen,
        alpha=alpha,
        budget=None if budget is None else parse_bytes(budget),
        host_budget=None if host_budget is None else parse_bytes(host_budget),
        keep_last=keep_last,
        strict=strict,
    )
