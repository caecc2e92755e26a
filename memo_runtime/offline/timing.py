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


def seconds_of(
    works: Sequence[tuple[int, Work]], machine: Machine, *, tokens: int, gpus: int, backward: bool
) -> Growth:
    """Seconds of ``works`` (tokens, work) by local tokens, for about ``tokens`` of them.

    Attention over all tokens is shared by ``gpus``.
    """
    shares = machine.shares
    products = growth_of([(tokens, work.matmul) for tokens, work in works])
    traffic = growth_of([(tokens, work.traffic) for tokens, work in works])
    return total(
        (products, 1 / (machine.peak_flops * shares.matmul)),
        (attention_seconds(works, machine, tokens=tokens, gpus=gpus, backward=backward), 1),
        (traffic, 1 / (machine.memory_rate * shares.elementwise)),
    )


def attention_seconds(
    works: Sequence[tuple[int, Work]], machine: Machine, *, tokens: int, gpus: int, backward: bool
) -> Growth:
    """Of these, seconds of attention."""
    share = machine.shares.attention(tokens * gpus, backward=backward)
    attention = growth_of([(tokens, work.attention) for tokens, work in works])
    # (gpus * t)^2 / gpus = gpus * t^2.
    attention = Growth(constant=attention.constant, linear=attention.linear, quadratic=attention.quadratic * gpus)
    return total((attention, 1 / (machine.peak_flops * share)))


def seconds(work: Work, machine: Machine) -> float:
    """Seconds of ``work`` without attention."""
    shares = machine.shares
    products = work.matmul / (machine.peak_flops * shares.matmul)
    return products + work.traffic / (machine.memory_rate * shares.elementwise)


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
