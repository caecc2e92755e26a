"""Random numbers that a tile can draw again, in any order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_BITS = 63


def bernoulli(shape: Sequence[int], keep: float, seed: int, device: torch.device) -> torch.Tensor:
    """A boolean tensor that is True with probability ``keep``; equal for equal arguments.

    The generator is one of its own, so neither the caller's random state nor the order of tiles matters.
    """
    generator = torch.Generator(device).manual_seed(seed % (1 << _BITS))
    return torch.empty(tuple(shape), dtype=torch.bool, device=device).bernoulli_(keep, generator=generator)


def mixed_seed(*parts: int) -> int:
    """One seed out of several numbers (splitmix64), so that neighbours give unrelated draws."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def new_seed() -> int:
    """A seed from PyTorch's default CPU generator: the caller's ``manual_seed`` decides it."""
    return int(torch.randint(0, 1 << 62, ()).item())
