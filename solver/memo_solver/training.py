"""Synthetic training steps by seed, shaped like recorded ones.

A step runs the blocks forward and then backward. Forward leaves skeletal
tensors that live until the block's backward; both directions make several times
as many transients that live a few dozen events; a few tensors (weight
gradients, collectives' buffers) live across blocks. Sizes come from a short list
(a few dozen distinct ones), most lifetimes are short, and the load has a narrow
spike where forward turns round: what is known of recorded traces of large models.
Sizes are in bytes, multiples of 512.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from memo_solver.bilevel import Block, Iteration
from memo_solver.records import Problem, Request

PAGE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """Requests of one direction of one layer, in the layer's own clock."""

    transients: tuple[tuple[int, int, int], ...]
    """(lower, upper, size)."""
    skeletal: tuple[tuple[int, int], ...]
    """(time, size): made in forward, freed at the mirrored time in backward."""
    length: int


def _sizes(rng: random.Random, count: int) -> list[int]:
    """A short list of tensor sizes as they follow from a few dimensions."""
    hidden = PAGE * rng.choice([1024, 2048, 4096, 6144])
    ratios = [1, 2, 3, 4, 6, 8, 1 / 2, 1 / 4, 1 / 8, 8 / 3, 1 / 64, 1 / 256, 3 / 8, 5 / 4, 7 / 2]
    sizes = {max(PAGE, int(hidden * r) // PAGE * PAGE) for r in ratios}
    while len(sizes) < count:
        sizes.add(PAGE * rng.randint(1, 64))
    return sorted(sizes)[:count]


def _layer(rng: random.Random, sizes: list[int], num_transients: int, num_skeletal: int) -> _Layer:
    length = 2 * num_transients + 2
    transients = []
    for _ in range(num_transients):
        lower = rng.randrange(length - 1)
        life = 1 + min(int(rng.expovariate(1 / 12)), 60) if rng.random() < 0.8 else rng.randint(20, length)
        transients.append((lower, min(lower + life, length), rng.choice(sizes)))
    skeletal = tuple((rng.randrange(length), rng.choice(sizes)) for _ in range(num_skeletal))
    return _Layer(transients=tuple(sorted(transients)), skeletal=skeletal, length=length)


def training_trace(num_requests: int, *, seed: int, num_layers: int = 48, jitter: float = 0.1) -> Problem:
    """One flat step of about `num_requests` requests; `jitter` of the transients differ by layer."""
    rng = random.Random(f"trace {num_requests} {seed} {num_layers} {jitter}")
    blocks, iteration = layered_step(
        num_requests, seed=seed, num_layers=num_layers, num_across=max(20, num_requests // 200)
    )
    requests = []
    for block in blocks:
        for r in block.requests:
            lower, upper, size = block.lower + r.lower, block.lower + r.upper, r.size
            if rng.random() < jitter:
                size = PAGE * rng.randint(1, 2 * size // PAGE)
                upper += rng.randint(0, 40)
            requests.append(Request(f"{block.id}/{r.id}", lower, upper, size))
    requests += iteration.requests
    return Problem(requests=tuple(requests))


def layered_step(
    num_requests: int, *, seed: int, num_layers: int = 80, num_across: int = 200, num_wrapping: int = 0
) -> tuple[list[Block], Iteration]:
    """A step of equal layers as blocks (forward and backward) and the requests across them.

    `num_across` requests live over several blocks; `num_wrapping` of them begin
    near the end of the step and end after its boundary, in the next one.
    """
    rng = random.Random(f"layered {num_requests} {seed} {num_layers} {num_across} {num_wrapping}")
    sizes = _sizes(rng, 33)
    per_layer = max(6, (num_requests - num_across) // num_layers)
    num_skeletal = max(2, per_layer // 9)
    num_forward = (per_layer - num_skeletal) * 2 // 5
    forward = _layer(rng, sizes, num_forward, num_skeletal)
    backward = _layer(rng, sizes, per_layer - num_skeletal - num_forward, 0)
    period = num_layers * (forward.length + backward.length)
    blocks, across = [], []
    for layer in range(num_layers):
        begin = layer * forward.length
        mirror = period - (layer + 1) * backward.length
        blocks.append(_block(f"f{layer}", forward, begin))
        blocks.append(_block(f"b{layer}", backward, mirror))
        for k, (time, size) in enumerate(forward.skeletal):
            end = mirror + 1 + (k * (backward.length - 1)) // len(forward.skeletal)
            across.append(Request(f"s{layer}.{k}", begin + time, end, size))
    for k in range(num_across - num_wrapping):
        lower = rng.randrange(period - 1)
        upper = min(period, lower + rng.randint(1, 3 * forward.length))
        across.append(Request(f"x{k}", lower, upper, rng.choice(sizes)))
    for k in range(num_wrapping):
        lower = period - rng.randint(1, 2 * backward.length)
        across.append(Request(f"w{k}", lower, period + rng.randint(1, forward.length), rng.choice(sizes)))
    iteration = Iteration(requests=tuple(across), period=period if num_wrapping else None)
    return blocks, iteration


def _block(name: str, layer: _Layer, begin: int) -> Block:
    requests = tuple(Request(f"t{k}", *transient) for k, transient in enumerate(layer.transients))
    return Block(id=name, lower=begin, upper=begin + layer.length, requests=requests)
