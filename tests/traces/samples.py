"""Traces to try things on."""

import random

from memo_runtime.traces.trace import Phase, TraceBuilder


def small_trace():
    """Two blocks forward and backward, by hand: s0 and s1 live across, t are transient."""
    builder = TraceBuilder()
    weights = builder.allocate(1000, before=True)
    builder.begin(Phase.STEP)
    saved = []
    for block in ("a", "b"):
        builder.begin(Phase.FORWARD, block)
        transient = builder.allocate(4096)
        saved.append(builder.allocate(2048))
        builder.free(transient)
        builder.end(Phase.FORWARD, block)
    for block in ("b", "a"):
        builder.begin(Phase.BACKWARD, block)
        first, second = builder.allocate(4096), builder.allocate(512, stream=7)
        builder.free(first)
        builder.free(second)
        builder.free(saved.pop())
        builder.end(Phase.BACKWARD, block)
    builder.end(Phase.STEP)
    assert weights == 0
    return builder.build(provenance={"model": "by hand"})


def random_trace(seed, *, events=400, largest=40 * 2**20, streams=2):
    """Allocations and frees at random, of sizes around the allocator's thresholds."""
    rng = random.Random(seed)
    builder, live = TraceBuilder(), []
    for _ in range(events):
        if live and rng.random() < 0.47:
            builder.free(live.pop(rng.randrange(len(live))))
        else:
            size = rng.choice([rng.randint(1, 2048), rng.randint(1, 2 * 2**20), rng.randint(1, largest)])
            live.append(builder.allocate(size, rng.randrange(streams)))
    return builder.build()
