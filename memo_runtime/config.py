"""What a user asks of ``memo.wrap``: the policy and the settings, checked when they are made."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from enum import StrEnum
from numbers import Integral, Real
from typing import TypeVar

from memo_runtime.errors import ArgumentError, ArgumentTypeError
from memo_runtime.units import parse_bytes, show_value


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


class OnRefusal(StrEnum):
    """What happens when the system gives less host memory than the plan needs and its limit allows."""

    STOP = "stop"
    GO_ON = "go_on"


class NativeMode(StrEnum):
    """Whether copies and pinned memory go through the native core: where it works, always, or never."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


def native_mode(mode: str | None = None) -> NativeMode:
    """``mode``, or what the environment variable ``MEMO_NATIVE`` says, or ``auto``.

    Raises:
        ArgumentError: an unknown mode.
    """
    text = mode or os.environ.get("MEMO_NATIVE", "").strip().lower() or NativeMode.AUTO
    try:
        return NativeMode(text)
    except ValueError:
        raise ArgumentError(f"MEMO_NATIVE={text!r} is unknown; there are: {', '.join(NativeMode)}") from None


#: Policies that fix the swap fraction; ``memo``, ``replay`` and ``tiled`` also take one from the user.
FIXED_ALPHA = {Policy.SWAP: 1.0, Policy.RECOMPUTE: 0.0}
_TAKES_ALPHA = (Policy.MEMO, Policy.REPLAY, Policy.TILED)
#: A bare number below this is a size whose unit was forgotten: no budget is so small.
_BARE_BYTES = 1024


#: Tokens of a tile, of all sequences together: from here on GPUs run at their full rate. Tiles of 8K, 16K and 32K
#: tokens are within 1 % of each other in time.
_TILE_TOKENS = 8192
LEAST_TILE = 128


def longest_tile(rows: int) -> int:
    """Tokens of the longest tile that is worth its memory, where a batch has ``rows`` sequences."""
    return max(LEAST_TILE, _TILE_TOKENS // rows // LEAST_TILE * LEAST_TILE)


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
        tile: tokens of a tile for ``tiled``; ``None``: planned.
    """

    policy: Policy = Policy.AUTO
    alpha: float | None = None
    budget: int | None = None
    host_budget: int | None = None
    keep_last: int | None = None
    strict: bool = False
    tile: int | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None:
            if isinstance(self.alpha, bool) or not isinstance(self.alpha, Real):
                raise ArgumentTypeError(
                    f"alpha={show_value(self.alpha)} ({type(self.alpha).__name__}) is not a number: give a fraction "
                    "from 0 (recompute) to 1 (swap), such as 0.5"
                )
            if self.policy not in _TAKES_ALPHA:
                takers = ", ".join(_TAKES_ALPHA)
                raise ArgumentError(
                    f"alpha={self.alpha} goes with policy {takers}; policy is '{self.policy}': give one of those, or "
                    "leave alpha out"
                )
            if not 0.0 <= self.alpha <= 1.0:
                raise ArgumentError(f"alpha={self.alpha} is not a fraction: give 0 (recompute) to 1 (swap)")
        if self.keep_last is not None:
            said = f"keep_last={show_value(self.keep_last)} is not a number of blocks"
            if isinstance(self.keep_last, bool) or not isinstance(self.keep_last, Integral):
                raise ArgumentTypeError(f"{said}: give a whole number, 0 or more, or leave it out to have it planned")
            if self.keep_last < 0:
                raise ArgumentError(f"{said}: give 0 or more, or leave it out to have it planned")
        if self.tile is not None:
            self._check_tile(self.tile)
        if not isinstance(self.strict, bool):
            raise ArgumentTypeError(f"strict={show_value(self.strict)} is not a yes or no: give True or False")


    def _check_tile(self, tile: object) -> None:
        said = f"tile={show_value(tile)} is not a number of tokens"
        if isinstance(tile, bool) or not isinstance(tile, Integral):
            raise ArgumentTypeError(f"{said}: give a whole number such as 8192, or leave it out to have it planned")
        if tile < 1:
            raise ArgumentError(f"{said}: give 1 or more, such as 8192, or leave it out to have it planned")
        if self.policy is not Policy.TILED:
            raise ArgumentError(
                f"tile={tile} goes with policy tiled; policy is '{self.policy}': give policy='tiled', or leave tile out"
            )


_Choice = TypeVar("_Choice", bound=StrEnum)


def choose(kind: type[_Choice], name: str, value: object) -> _Choice:
    """Member of ``kind`` that a user calls ``value`` in argument ``name``.

    Raises:
        ArgumentError: no such choice; names those that there are.
    """
    names = [member.value for member in kind]
    chosen = next((member for member in kind if member == value), None)
    if chosen is None:
        close = difflib.get_close_matches(value.lower(), names, n=1) if isinstance(value, str) else []
        meant = f" (did you mean '{close[0]}'?)" if close else ""
        raise ArgumentError(f"{name}={show_value(value)} is unknown{meant}; there are: {', '.join(names)}")
    return chosen


def read_size(name: str, value: int | str | None) -> int | None:
    """Bytes of the argument, or option, called ``name``.

    Raises:
        ArgumentError: no size, or one whose unit was forgotten. ArgumentTypeError: neither text nor number.
    """
    if value is None:
        return None
    try:
        size = parse_bytes(value)
    except ValueError as error:
        if isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < _BARE_BYTES:
            raise ArgumentError(_bare(name, value)) from None
        number = isinstance(value, (str, Real)) and not isinstance(value, bool)
        raise (ArgumentError if number else ArgumentTypeError)(f"{name}={error}") from None
    bare = not isinstance(value, str) or value.strip()[-1:].isdigit()
    if bare and 0 < size < _BARE_BYTES:
        raise ArgumentError(_bare(name, value))
    return size


def _bare(name: str, value: object) -> str:
    number = str(value).strip()
    return f"{name}={show_value(value)} would be {number} bytes: did you mean {name}='{number}GiB'?"


def make_settings(
    *,
    policy: str = "auto",
    alpha: float | None = None,
    budget: int | str | None = None,
    host_budget: int | str | None = None,
    keep_last: int | None = None,
    strict: bool = False,
    tile: int | None = None,
) -> Settings:
    """``Settings`` from what users write: names of policies, sizes as text.

    Raises:
        ArgumentError: an unknown policy, a size that is none, or knobs that do not go together.
    """
    device_bytes = read_size("budget", budget)
    if device_bytes == 0:
        raise ArgumentError(
            f"budget={show_value(budget)} leaves no memory for the model itself: give a size such as '70GiB', or leave "
            "it out for what the device has"
        )
    return Settings(
        policy=choose(Policy, "policy", policy),
        alpha=float(alpha) if isinstance(alpha, Real) and not isinstance(alpha, (int, float)) else alpha,
        budget=device_bytes,
        host_budget=read_size("host_budget", host_budget),
        keep_last=keep_last,
        strict=strict,
        tile=tile,
    )
