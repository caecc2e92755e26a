"""When a plan's blocks compute and copy: three lanes of bars, from the times of its profile.

Forwards follow one another; copies to the host begin when a block's forward is over; the fetch of a block begins with
the backward of the nearest block above that fetches or is kept, and its backward waits for it. Blocks that make their
input again have it fetched with what that takes; late ones fetch when they go backward. Products of tiles go while
their block's forward runs, and come back while its backward does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memo_runtime.records import BlockPlan, BlockProfile, Executor, Plan


@dataclass(frozen=True, slots=True)
class Bar:
    """``lane`` (compute, to host, to device) is busy from ``start`` to ``end`` seconds with ``what`` of ``block``."""

    lane: str
    block: str
    what: str
    start: float
    end: float


def lanes_of(plan: Plan) -> list[Bar]:
    """The bars of one step."""
    bars: list[Bar] = []
    pairs = list(zip(plan.profile.blocks, plan.blocks, strict=True))
    now = out = 0.0
    for profiled, block in pairs:
        end = now + profiled.forward_seconds.exact(block.tokens)
        bars.append(Bar("compute", block.name, "forward", now, end))
        products = _products(profiled, block)
        if seconds := _seconds(products, plan.profile.link.to_host):
            out = max(out, now) + seconds
            bars.append(Bar("to host", block.name, "products", out - seconds, out))
        now = end
        if seconds := _seconds(block.bytes_to_host - products, plan.profile.link.to_host):
            out = max(out, now) + seconds
            bars.append(Bar("to host", block.name, "copy", out - seconds, out))
    now = max(now, out)
    head = plan.profile.outside_seconds.exact(plan.blocks[-1].tokens) if plan.blocks else 0.0
    bars.append(Bar("compute", "", "embedding, head and loss", now, now + head))
    now += head
    began, fetched = now, 0.0
    for index, (profiled, block) in reversed(list(enumerate(pairs))):
        products = _products(profiled, block)
        # What inputs are made again of is fetched for the top block.
        above = pairs[index + 1][1].from_below if index + 1 < len(pairs) else False
        fetch = block.bytes_to_device if block.late else 0 if above else _of_run(pairs, index)
        if seconds := _seconds(fetch, plan.profile.link.to_device):
            fetched = max(fetched, now if block.late else began) + seconds
            bars.append(Bar("to device", block.name, "fetch", fetched - seconds, fetched))
            now = max(now, fetched)
        began = now
        if seconds := _seconds(products, plan.profile.link.to_device):
            fetched = max(fetched, began) + seconds
            bars.append(Bar("to device", block.name, "products", fetched - seconds, fetched))
        for what, length in (("rerun", _rerun(profiled, block)), ("backward", _backward(profiled, block))):
            if length:
                bars.append(Bar("compute", block.name, what, now, now + length))
                now += length
    return bars


def _of_run(pairs: Sequence[tuple[BlockProfile, BlockPlan]], index: int) -> int:
    """Bytes of the stash that come back for block ``index``, and for those below it that its input is made again of."""
    profiled, block = pairs[index]
    below = _of_run(pairs, index - 1) if block.from_below else 0
    return below + block.bytes_to_device - _products(profiled, block)


def _products(profiled: BlockProfile, block: BlockPlan) -> int:
    """Bytes of products that go to the host and come back."""
    if not block.sent or profiled.tiled is None:
        return 0
    return profiled.tiled.product_bytes(block.prefix) - profiled.tiled.product_bytes(block.prefix - block.sent)


def _seconds(size_bytes: int, rate: float) -> float:
    return size_bytes / rate if size_bytes and rate > 0 else 0.0


def _backward(profiled: BlockProfile, block: BlockPlan) -> float:
    return profiled.backward_seconds.exact(block.tokens)


def _rerun(profiled: BlockProfile, block: BlockPlan) -> float:
    if block.executor is Executor.RECOMPUTE:
        return profiled.forward_seconds.exact(block.tokens)
    if block.executor is Executor.REPLAY and block.prefix < block.tokens:
        return profiled.rebuild_seconds(block.tokens - block.prefix, written=block.prefix > 0)
    if block.executor is Executor.TILED and (flops := profiled.rerun_flops.at(block.tokens)):
        return profiled.rerun_seconds.exact(block.tokens) * block.recomputed_flops / flops
    return 0.0
