"""Seconds from work: what a machine takes for products, attention and everything else, as polynomials in the tokens."""

from __future__ import annotations

from collections.abc import Sequence

from memo_runtime.machines.machine import Machine
from memo_runtime.offline.work import Work
from memo_runtime.profiling.growth import fit_counts
from memo_runtime.records import Growth


def growth_of(samples: Sequence[tuple[int, int]]) -> Growth:
    """The exact polynomial through counts at three lengths."""
    return fit_counts(list(samples))


def seconds_of(works: Sequence[tuple[int, Work]], machine: Machine, *, gpus: int, backward: bool) -> Growth:
    """Seconds of ``works`` (tokens, work) by local tokens; attention over all tokens is shared by ``gpus``."""
    shares = machine.shares
    attention_share = shares.attention_backward if backward else shares.attention_forward
    products = growth_of([(tokens, work.matmul) for tokens, work in works])
    attention = growth_of([(tokens, work.attention) for tokens, work in works])
    traffic = growth_of([(tokens, work.traffic) for tokens, work in works])
    # (gpus * t)^2 / gpus = gpus * t^2.
    attention = Growth(constant=attention.constant, linear=attention.linear, quadratic=attention.quadratic * gpus)
    return total(
        (products, 1 / (machine.peak_flops * shares.matmul)),
        (attention, 1 / (machine.peak_flops * attention_share)),
        (traffic, 1 / (machine.memory_rate * shares.elementwise)),
    )


def total(*parts: tuple[Growth, float]) -> Growth:
    """The sum of growths, each times a factor."""
    return Growth(
        constant=sum(growth.constant * factor for growth, factor in parts),
        linear=sum(growth.linear * factor for growth, factor in parts),
        quadratic=sum(growth.quadratic * factor for growth, factor in parts),
    )


def per_token(size_bytes: float, rate: float) -> Growth:
    """Seconds for ``size_bytes`` of every token at ``rate``."""
    return Growth(linear=size_bytes / rate)
