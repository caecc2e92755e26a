"""What one block, planned, holds on the device and takes: bytes and seconds, from its profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memo_runtime.planning.actions import row_bytes
from memo_runtime.records import (
    RESIDENT_ROLES,
    Action,
    BlockPlan,
    BlockProfile,
    Executor,
    Link,
    Moment,
    Role,
    Stretch,
    TensorGroup,
    TiledProfile,
)
from memo_runtime.sizes import TILES_AHEAD, TILES_OUTSTANDING, stored_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SentProducts:
    """What a block by tiles sends of its products: bytes and seconds.

    Attributes:
        total: of all its tiles. under_way: most that may be on the way at once. first: of the tiles that come back
            while the block above is in its last stretch.
        copies: seconds of both ways alone. left: of those to the host, what is still to do when its forward ends.
        waits: what its forward and backward wait for.
    """

    total: int = 0
    under_way: int = 0
    first: int = 0
    copies: float = 0.0
    left: float = 0.0
    waits: float = 0.0


NO_PRODUCTS = SentProducts()


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What one block, planned, holds and takes; bytes and seconds.

    Attributes:
        skeletal: saved while its forward runs. outgoing: sources of its copies to the host. kept: stashed on
            the device. full: all that its rerun and backward need, fetched and rebuilt. spent: what of that only
            the rerun reads. landing: buffers of its fetch.
        copies: its backward fetches something. stashed: its stash is sorted when its forward ends, when rows
            that are kept have been copied and what they were copied from is still there.
        to_host, to_device: seconds of its copies alone. again: seconds of its rerun.
        forward_peak, backward_peak: transient bytes beyond all these. end_peak: when its stash is sorted.
        rerun_peak: in its rerun, with the gradient that waits for it; 0: it has none.
        gradients: of its own parameters. kept_rows: of ``kept``, rows that are copied for it; all else that is
            kept stays where it is.
        gathered: copies of small tensors, made when its stash is sorted to be sent together.
        output: of its result.
        stretches: by tiles, what its backward takes before its attention, with it and behind it, as far as there is
            such a stretch: transient bytes, and of these what has landed of products.
        sent: products that go to the host.
        entry: of what it keeps on the device, its input: the caller's tensor, which was there before.
        from_below: its input is made again, which is of ``full``, and what that takes is fetched with it. passing:
            seconds to make that of the block above, and ``passing_peak`` transient bytes meanwhile. result: bytes of
            what it yields, where an input is made again from it.
        late: nothing is fetched before its backward; ``to_device`` and ``passing`` are of all that its run does with
            it.
    """

    skeletal: int
    outgoing: int
    kept: int
    full: int
    spent: int
    landing: int
    copies: bool
    stashed: bool
    forward: float
    backward: float
    again: float
    to_host: float
    to_device: float
    forward_peak: int
    backward_peak: int
    end_peak: int
    rerun_peak: int
    gradients: int
    kept_rows: int = 0
    gathered: int = 0
    output: int = 0
    stretches: tuple[tuple[Stretch, int, int], ...] = ()
    sent: SentProducts = NO_PRODUCTS
    entry: int = 0
    from_below: bool = False
    passing: float = 0.0
    passing_peak: int = 0
    result: int = 0
    late: bool = False


def copy_seconds(size_bytes: float, rate: float) -> float:
    """Seconds for ``size_bytes`` at ``rate`` bytes per second; a rate of 0 was not measured: no time."""
    return size_bytes / rate if rate > 0 else 0.0


def footprint(block: BlockProfile, plan: BlockPlan, link: Link) -> Footprint:
    """What ``block`` holds and takes when it runs as ``plan`` says."""
    if plan.executor is Executor.TILED:
        return _tiled_footprint(block, plan, link)
    tokens = plan.tokens
    skeletal = full = spent = landing = unsaved_input = kept_rows = gathered = entry = 0
    live: list[TensorGroup] = []
    sources: list[TensorGroup] = []
    rebuilt: list[TensorGroup] = []
    copies = False
    for group, action in zip(block.groups, plan.actions, strict=True):
        if group.role in RESIDENT_ROLES:
            continue
        size = group.size.at(tokens)
        if group.bundle is not None:
            skeletal += group.bundle.live.at(tokens)
        elif group.saved:
            live.append(group)
        unsaved_input += size if group.role is Role.INPUT and not group.saved else 0
        if group.role is Role.INPUT and group.saved and action is Action.KEEP:
            entry += group.size.at(min(tokens, block.tokens))
        if action in (Action.HOST, Action.PREFIX, Action.TAIL):
            copies = True
            fetched = size
            if action is Action.TAIL:
                fetched = row_bytes(group, tokens - plan.prefix)
            elif group.bundle is not None:
                fetched = group.bundle.copied.at(tokens)
                gathered += group.bundle.gathered.at(tokens)
            full += fetched
            landing += fetched
            spent += 0 if group.saved else fetched
            kept_rows += row_bytes(group, plan.device_rows) if action is Action.PREFIX else 0
            if action is not Action.PREFIX or plan.prefix > plan.device_rows:
                sources.append(group)
        elif action is Action.REBUILD and group.saved:
            rebuilt.append(group)
    return Footprint(
        skeletal=skeletal + stored_bytes(live, tokens),
        # Copies that were made to be sent stay until they are, and so may what they were made of.
        outgoing=stored_bytes(sources, tokens) + gathered,
        kept=plan.bytes_kept,
        full=full + stored_bytes(rebuilt, tokens),
        spent=spent,
        landing=landing,
        copies=copies,
        stashed=plan.executor in (Executor.REPLAY, Executor.RECOMPUTE),
        forward=block.forward_seconds.exact(tokens),
        backward=block.backward_seconds.exact(tokens),
        again=rerun_seconds(block, plan),
        to_host=copy_seconds(plan.bytes_to_host, link.to_host),
        to_device=copy_seconds(plan.bytes_to_device, link.to_device),
        # The caller holds a block's input until it has the result, whether or not autograd saves it.
        forward_peak=block.forward_peak.at(tokens) + unsaved_input,
        backward_peak=block.backward_peak.at(tokens),
        end_peak=block.output.at(tokens) + unsaved_input,
        rerun_peak=rerun_bytes(block, plan),
        gradients=block.gradients,
        kept_rows=kept_rows,
        gathered=gathered,
        output=block.output.at(tokens),
        entry=entry,
    )


def _tiled_footprint(block: BlockProfile, plan: BlockPlan, link: Link) -> Footprint:
    takes, tokens = block.tiled, plan.tokens
    assert takes is not None, "a block that is planned by tiles was profiled so"
    stash = sum(size.at(tokens) for size in takes.stash)
    made_again = takes.stash[0].at(tokens) if plan.from_below else 0
    swapped = 0 if plan.device_rows else stash - made_again
    products = takes.product_bytes(plan.prefix - plan.sent)
    stays = takes.resident.at(tokens) + (takes.mixer_inputs.at(tokens) if plan.mixer_inputs else 0)
    timed = takes if takes.seconds_per_flop else block
    stretches = _stretches(takes, plan, products)
    rate = takes.seconds_per_flop or _seconds_per_flop(block, tokens)
    stays_with_input = bool(takes.stash) and plan.device_rows > 0 and not plan.from_below
    times = plan.passes if plan.late else int(plan.for_above)
    return Footprint(
        skeletal=stash + stays + products,
        outgoing=swapped,
        kept=plan.bytes_kept,
        full=swapped + made_again,
        spent=0,
        landing=swapped,
        copies=swapped > 0,
        stashed=False,
        forward=timed.forward_seconds.exact(tokens),
        backward=timed.backward_seconds.exact(tokens),
        again=_again_seconds(block, takes, plan),
        to_host=copy_seconds(swapped, link.to_host),
        to_device=copy_seconds((1 + plan.passes) * swapped, link.to_device),
        forward_peak=_highest(_forward_moments(takes, plan), plan, backward=False) - products,
        backward_peak=max((peak for _, peak, _ in stretches), default=0),
        end_peak=0,
        rerun_peak=0,
        gradients=block.gradients,
        output=block.output.at(tokens),
        stretches=stretches,
        sent=_sent_products(takes, plan, link) if plan.sent else NO_PRODUCTS,
        entry=takes.stash[0].at(min(tokens, block.tokens)) if stays_with_input else 0,
        from_below=plan.from_below,
        passing=times * takes.result_flops.at(tokens) * rate,
        passing_peak=_highest(takes.result, plan, backward=False) - products if plan.for_above else 0,
        # What is handed on is as large as what it is handed.
        result=takes.stash[0].at(tokens) if plan.for_above else 0,
        late=plan.late,
    )


def _forward_moments(takes: TiledProfile, plan: BlockPlan) -> tuple[Moment, ...]:
    if plan.mixer_inputs:
        return takes.forward_with_inputs
    return takes.forward if plan.groups == 1 else takes.forward_by_groups


def _backward_moments(takes: TiledProfile, plan: BlockPlan) -> tuple[Moment, ...]:
    if plan.mixer_inputs:
        return takes.backward_with_inputs
    return takes.backward if plan.groups == 1 else takes.backward_by_groups


def _stretches(takes: TiledProfile, plan: BlockPlan, products: int) -> tuple[tuple[Stretch, int, int], ...]:
    """See ``Footprint``. Products of the last stage land before attention, if there is any, and others behind it."""
    backward = _backward_moments(takes, plan)
    by_stretch = {one: [moment for moment in backward if moment.stretch is one] for one in Stretch}
    rows = min(plan.sent, (1 + TILES_AHEAD) * plan.tile)
    last, others = (max((size.at(rows) for size in some), default=0)
                    for some in (takes.products[-1:], takes.products[:-1]))  # fmt: skip
    found = []
    for one, moments in by_stretch.items():
        if moments:
            landed = last if one is Stretch.EARLY else others if by_stretch[Stretch.EARLY] else max(last, others)
            found.append((one, _highest(moments, plan, backward=True) - products, landed))
    return tuple(found)


def _sent_products(takes: TiledProfile, plan: BlockPlan, link: Link) -> SentProducts:
    """Of ``plan``, which sends some. The backward of a tile takes twice its forward."""
    prefix, sent, tile = plan.prefix, plan.sent, plan.tile
    stays = prefix - sent
    total = takes.product_bytes(prefix) - takes.product_bytes(stays)
    largest = max(size.at(min(tile, sent)) for size in takes.products)
    count = sum(-(-sent // tile) for size in takes.products if size.linear)
    out, back = copy_seconds(total, link.to_host), copy_seconds(total, link.to_device)
    compute = takes.product_seconds.exact(sent)
    beside = compute * (count - 1) / count if count else 0.0
    return SentProducts(
        total=total,
        under_way=TILES_OUTSTANDING * largest,
        first=takes.products[-1].at(max(0, min(prefix, TILES_AHEAD * tile) - stays)),
        copies=out + back,
        left=min(max(0.0, out - beside), copy_seconds((1 + TILES_OUTSTANDING) * largest, link.to_host)),
        waits=max(0.0, copy_seconds(max(0, count - 1 - TILES_OUTSTANDING) * largest, link.to_host) - beside)
        + max(0.0, back - 2 * compute),
    )


def _again_seconds(block: BlockProfile, takes: TiledProfile, plan: BlockPlan) -> float:
    """Seconds of what is run again; products that are kept save what was measured, which is less than their FLOPs."""
    if not takes.seconds_per_flop:
        passing = (plan.passes if plan.late else int(plan.for_above)) * takes.result_flops.at(plan.tokens)
        return (plan.recomputed_flops - passing) * _seconds_per_flop(block, plan.tokens)
    all_again = takes.again_flops.at(plan.tokens) + (plan.groups - 1) * takes.group_flops.at(plan.tokens)
    all_again -= takes.mixer_input_flops.at(plan.tokens) if plan.mixer_inputs else 0
    return all_again * takes.seconds_per_flop - takes.saved_seconds.exact(plan.prefix)


def _highest(moments: Sequence[Moment], plan: BlockPlan, *, backward: bool) -> int:
    """Most bytes beside a complete stash, products that are there among them; a stretch may have none."""
    sizes = (
        one.bytes_at(plan.tokens, plan.tile, plan.prefix, backward=backward, sent=plan.sent, groups=plan.groups)
        for one in moments
    )
    return max((size for size in sizes if size is not None), default=0)


def _seconds_per_flop(block: BlockProfile, tokens: int) -> float:
    """Of what is not attention, as a rerun on tokens showed; else of the whole block."""
    flops, seconds = block.rerun_flops.at(tokens), block.rerun_seconds.exact(tokens)
    if flops <= 0 or seconds <= 0:
        flops, seconds = block.forward_flops.at(tokens), block.forward_seconds.exact(tokens)
    return seconds / flops if flops > 0 else 0.0


def rerun_bytes(block: BlockProfile, plan: BlockPlan) -> int:
    """Transient bytes of a rerun, with the gradient of the block's result, which waits for it; 0: there is none."""
    waiting = block.output.at(plan.tokens)
    if plan.executor is Executor.REPLAY and 0 < plan.prefix < plan.tokens:
        constant, per_row = rerun_line(block, plan.tokens)
        return waiting + round(constant + per_row * (plan.tokens - plan.prefix))
    if plan.executor is Executor.RECOMPUTE or (plan.executor is Executor.REPLAY and not plan.prefix):
        # All that it makes is kept, as in the forward.
        return waiting + block.forward_peak.at(plan.tokens)
    return 0


def rerun_line(block: BlockProfile, tokens: int) -> tuple[float, float]:
    """(bytes, bytes per rebuilt row) that a rerun takes beside the buffers that its rows are written to."""
    constant = block.rerun_peak.constant
    return constant, (block.rerun_peak.exact(tokens) - constant) / max(1, tokens)


def rerun_seconds(block: BlockProfile, plan: BlockPlan) -> float:
    """Seconds in which what backward needs is made again."""
    if plan.executor is Executor.RECOMPUTE:
        return block.forward_seconds.exact(plan.tokens)
    if plan.executor is Executor.REPLAY and plan.prefix < plan.tokens:
        return block.rebuild_seconds(plan.tokens - plan.prefix, written=plan.prefix > 0)
    return 0.0
