"""Synthetic steps of one stage of a training pipeline, by seed.

A stage runs several micro-batches one forward, one backward (1F1B): as many as there are stages are under way
at once, so the load is a long plateau instead of a spike. With experts, the tensors of each block have sizes
of their own. Forward leaves its tensors to the backward of the same block and micro-batch; backward has
transients, weight gradients (some kept to the end) and gradient buckets. Sizes are in bytes, multiples of 512.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from memo_solver.records import Problem, Request

PAGE = 512
FORWARD = (("norm1", 1.0), ("qkv", 1.5), ("attention", 1.0), ("residual1", 1.0), ("norm2", 1.0), ("gate", 3.5),
           ("up", 3.5), ("residual2", 1.0))  # fmt: skip
"""What a block keeps for its backward, in multiples of the hidden state."""
ROUTED = ("gate", "up")
"""Tensors whose size depends on the tokens that the experts got."""


@dataclass(slots=True)
class _Trace:
    """A clock that ticks at each event, and the requests that have ended."""

    time: int = 0
    live: dict[str, tuple[int, int]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def take(self, name: str, size: float) -> None:
        self.live[name] = (self.time, max(PAGE, int(size) // PAGE * PAGE))
        self.time += 1

    def give(self, *names: str) -> None:
        for name in names:
            lower, size = self.live.pop(name)
            self.requests.append(Request(name, lower, self.time, size))
            self.time += 1


def pipelined_trace(
    num_layers: int, num_micro: int, *, seed: int, num_stages: int = 4, routed: bool = False
) -> Problem:
    """The first stage's step: `num_layers` blocks and `num_micro` micro-batches; `routed` varies expert sizes."""
    rng = random.Random(f"pipelined {num_layers} {num_micro} {num_stages} {routed} {seed}")
    hidden = 2 * rng.choice([2048, 4096, 5120]) * rng.choice([1024, 2048, 4096])
    trace = _Trace()
    ahead = min(num_stages, num_micro)
    for micro in range(ahead):
        _forward(trace, micro, num_layers, hidden, rng if routed else None)
    for micro in range(num_micro):
        _backward(trace, micro, num_layers, hidden, rng)
        if micro + ahead < num_micro:
            _forward(trace, micro + ahead, num_layers, hidden, rng if routed else None)
    trace.give(*trace.live)
    rng.shuffle(trace.requests)
    return Problem(requests=tuple(trace.requests))


def _forward(trace: _Trace, micro: int, num_layers: int, hidden: int, rng: random.Random | None) -> None:
    for layer in range(num_layers):
        name = f"m{micro}.{layer}."
        for tensor, factor in FORWARD:
            varied = factor * rng.uniform(0.5, 1.6) if rng is not None and tensor in ROUTED else factor
            trace.take(name + tensor, hidden * varied)
            if tensor == "qkv":
                trace.take(name + "workspace", hidden / 2)
                trace.give(name + "workspace")
        trace.take(name + "lse", hidden / 64)
        trace.take(name + "product", hidden * 3.5)
        trace.give(name + "product")


def _backward(trace: _Trace, micro: int, num_layers: int, hidden: int, rng: random.Random) -> None:
    for layer in reversed(range(num_layers)):
        name = f"m{micro}.{layer}."
        trace.take(name + "dy", hidden)
        trace.take(name + "dgate", hidden * 3.5)
        trace.take(name + "dup", hidden * 3.5)
        trace.give(name + "residual2")
        trace.take(name + "dweight", hidden / rng.choice([3, 5]))
        trace.give(name + "gate", name + "up")
        trace.take(name + "dx", hidden)
        trace.give(name + "dgate", name + "dup", name + "norm2", name + "residual1")
        trace.take(name + "dqkv", hidden * 1.5)
        trace.take(name + "delta", hidden / 64)
        trace.give(*(name + t for t in ("attention", "lse", "delta", "qkv", "dqkv", "norm1", "dx", "dy")))
        trace.take(name + "bucket", hidden / 4)
        trace.give(name + "bucket")
        if rng.random() < 0.7:
            trace.give(name + "dweight")
