"""Simulating a step: what a plan holds on the device at every point, and how long the step takes.

    forward  | block 0 | block 1 | ... | head, loss |     backward | ... | block 1 | block 0 |
    holds      skel 0    skel 1          all kept                          full 1    full 0
                         + kept 0                                          + kept    + kept 0
                         + copies of 0                                     + landing of 0

A block's *skeletal* bytes live while its forward runs, its *copies out* while the next one runs (on CUDA: the
source of a copy stays alive until the copy is done; on CPU copies are synchronous), its *kept* bytes until
its backward is over, and in backward all that it needs is there in *full*, beside the bytes that *land* for
the nearest lower block that has copies. Where those are few beside what the block frees as it goes, they come when that
is free, and take no room of their own (``put_off``). A rerun needs room of its own before backward does; what only the
rerun reads is gone then.

On a device with an allocator, gradients come as backward walks down: those outside the blocks (head, embedding)
with the head, a block's own within its ``backward_peak``, those of the blocks above while a block goes backward,
all of them at the end. In a step that starts with gradients (accumulation) all are there at every point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memo_runtime.planning.actions import RESIDENT_ROLES, row_bytes
from memo_runtime.records import (
    FETCH_PARTS,
    Action,
    BlockPlan,
    BlockProfile,
    Executor,
    Forecast,
    Link,
    Moment,
    Profile,
    Role,
    TiledProfile,
)
from memo_runtime.sizes import WITNESS_ROWS
from memo_runtime.units import MiB


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
        held: what its backward takes more where somebody else holds the gradient of its result.
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
    held: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The highest points of a step.

    ``stash_peak`` counts what the runtime holds; ``device_peak`` adds what blocks, head and loss need while
    they run and gradients, and was reached in ``phase`` ("forward", "end of forward", "rerun", "backward",
    "head and loss", "end of backward") of block ``index``. ``gradients`` are the bytes of gradients there.
    """

    gradients: int
    stash_peak: int
    device_peak: int
    index: int
    phase: str


def copy_seconds(size_bytes: float, rate: float) -> float:
    """Seconds for ``size_bytes`` at ``rate`` bytes per second; a rate of 0 was not measured: no time."""
    return size_bytes / rate if rate > 0 else 0.0


def footprint(block: BlockProfile, plan: BlockPlan, link: Link) -> Footprint:
    """What ``block`` holds and takes when it runs as ``plan`` says."""
    if plan.executor is Executor.TILED:
        return _tiled_footprint(block, plan, link)
    tokens = plan.tokens
    skeletal = outgoing = full = spent = landing = unsaved_input = kept_rows = gathered = 0
    copies = False
    for group, action in zip(block.groups, plan.actions, strict=True):
        if group.role in RESIDENT_ROLES:
            continue
        size = group.size.at(tokens)
        if group.bundle is not None:
            skeletal += group.bundle.live.at(tokens)
        else:
            skeletal += size if group.saved else 0
        unsaved_input += size if group.role is Role.INPUT and not group.saved else 0
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
                outgoing += size
        elif action is Action.REBUILD and group.saved:
            full += size
    return Footprint(
        skeletal=skeletal,
        # Copies that were made to be sent stay until they are, and so may what they were made of.
        outgoing=outgoing + gathered,
        kept=plan.bytes_kept,
        full=full,
        spent=spent,
        landing=landing,
        copies=copies,
        stashed=plan.executor in (Executor.REPLAY, Executor.RECOMPUTE),
        forward=block.forward_seconds.exact(tokens),
        backward=block.backward_seconds.exact(tokens),
        again=_rerun_seconds(block, plan),
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
    )


def _tiled_footprint(block: BlockProfile, plan: BlockPlan, link: Link) -> Footprint:
    takes, tokens = block.tiled, plan.tokens
    assert takes is not None, "a block that is planned by tiles was profiled so"
    stash = sum(size.at(tokens) for size in takes.stash)
    swapped = 0 if plan.device_rows else stash
    products = takes.products.at(plan.prefix)
    timed = takes if takes.seconds_per_flop else block
    return Footprint(
        skeletal=stash + takes.resident.at(tokens) + products,
        outgoing=swapped,
        kept=plan.bytes_kept,
        full=swapped,
        spent=0,
        landing=swapped,
        copies=swapped > 0,
        stashed=False,
        forward=timed.forward_seconds.exact(tokens),
        backward=timed.backward_seconds.exact(tokens),
        again=_again_seconds(block, takes, plan),
        to_host=copy_seconds(plan.bytes_to_host, link.to_host),
        to_device=copy_seconds(plan.bytes_to_device, link.to_device),
        forward_peak=_highest(takes.forward, plan, backward=False) - products,
        backward_peak=_highest(takes.backward, plan, backward=True) - products,
        end_peak=0,
        rerun_peak=0,
        gradients=block.gradients,
        held=block.output.at(tokens),
    )


def _again_seconds(block: BlockProfile, takes: TiledProfile, plan: BlockPlan) -> float:
    """Seconds of what is run again; products that are kept save what was measured, which is less than their FLOPs."""
    if not takes.seconds_per_flop:
        return plan.recomputed_flops * _seconds_per_flop(block, plan.tokens)
    all_again = takes.again_flops.at(plan.tokens) * takes.seconds_per_flop
    return all_again - takes.saved_seconds.exact(plan.prefix)


def _highest(moments: tuple[Moment, ...], plan: BlockPlan, *, backward: bool) -> int:
    """Most bytes beside a complete stash, products that are kept among them."""
    sizes = (one.bytes_at(plan.tokens, plan.tile, plan.prefix, backward=backward) for one in moments)
    return max(size for size in sizes if size is not None)


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


def _rerun_seconds(block: BlockProfile, plan: BlockPlan) -> float:
    if plan.executor is Executor.RECOMPUTE:
        return block.forward_seconds.exact(plan.tokens)
    if plan.executor is Executor.REPLAY and plan.prefix < plan.tokens:
        return block.rebuild_seconds(plan.tokens - plan.prefix, written=plan.prefix > 0)
    return 0.0


#: Of a free block that is at most this much larger than a request PyTorch's allocator splits nothing off, and counts
#: all of it as allocated (``kSmallSize``, c10/cuda/CUDACachingAllocator.cpp; expandable segments split everything).
_UNSPLIT = MiB
#: It rounds small requests up to this.
_SMALLEST = 512


def allowance(profile: Profile, tokens: int) -> int:
    """Bytes on a device with an allocator that are nobody's: what it adds to large tensors, and a sample of a witness.

    A block in backward takes tensors of several sizes (slices of reruns among them) out of what others have freed, so
    that each may be larger than it asked for; what is kept mostly returns to where one of its size was.
    """
    most = sample = 0
    for block in profile.blocks:
        sizes = [(group, group.size.at(max(tokens, block.tokens))) for group in block.groups]
        own = [(group, size) for group, size in sizes if group.role not in RESIDENT_ROLES]
        most = max(most, sum(size > _UNSPLIT for _, size in own))
        rows = max((round(group.size.linear) for group, _ in own if group.splits), default=0)
        sample = max(sample, WITNESS_ROWS * rows)
    return (0 if profile.expandable else most * _UNSPLIT) + sample + 2 * _SMALLEST


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """The part of a step that no choice changes: the model's states, the head and the loss.

    Attributes:
        asynchronous: copies run beside compute (CUDA).
        base_bytes: on the device at every point: states, with the optimizer's in full; on CUDA also what else was
            alive in the profiled step, and an ``allowance``. Gradients in full where they do not come ``gradual``ly.
        gradual: gradients come as backward walks down, where an allocator counts (CUDA). On CPU, where bytes are
            accounted, they are reserved at every point.
        outside_gradients: of parameters outside the blocks, from the head's backward on, and ``last_gradients``, when
            all blocks have gone backward; 0 if not gradual.
        outside_peak: bytes of head and loss while they run; 0 where no allocator counts (CPU).
    """

    asynchronous: bool
    base_bytes: int
    gradual: bool
    outside_gradients: int
    last_gradients: int
    outside_peak: int
    outside_seconds: float

    @classmethod
    def of(cls, profile: Profile, tokens: int, *, accumulating: bool = False) -> Surroundings:
        """Those of ``profile`` where the last stack is given ``tokens``; ``accumulating``: gradients are there."""
        states = profile.states
        asynchronous = profile.device_type != "cpu"
        gradual = asynchronous and not accumulating
        in_blocks = sum(block.gradients for block in profile.blocks)
        if asynchronous:
            base = (
                profile.allocated_bytes
                - states.gradients_present
                + (0 if gradual else max(states.gradients, states.gradients_present))
                + max(0, states.optimizer - states.optimizer_present)
                + profile.shared.at(tokens)
                + profile.outside_forward.at(tokens)
                + allowance(profile, tokens)
            )
        else:
            base = states.parameters + states.buffers + states.gradients + states.optimizer
        last = states.gradients_last if gradual else 0
        outside = max(0, states.gradients - in_blocks - last) if gradual else 0
        # The loss by tiles is at its highest before there is a gradient of the head.
        peak = max(profile.outside_peak.at(tokens), profile.loss_peak.at(tokens) - outside)
        return cls(
            asynchronous=asynchronous,
            base_bytes=base,
            gradual=gradual,
            outside_gradients=outside,
            last_gradients=last,
            outside_peak=peak if asynchronous else 0,
            outside_seconds=profile.outside_seconds.exact(tokens),
        )

    def forecast(self, plans: Sequence[BlockPlan], footprints: Sequence[Footprint]) -> Forecast:
        """The totals of one steady step."""
        course = run_course(self, footprints)
        return Forecast(
            step_seconds=step_seconds(self, footprints),
            peak_bytes=self.base_bytes + course.device_peak,
            host_bytes=sum(plan.host_bytes for plan in plans),
            bytes_to_host=sum(plan.bytes_to_host for plan in plans),
            bytes_to_device=sum(plan.bytes_to_device for plan in plans),
            bytes_kept=sum(plan.bytes_kept for plan in plans),
            recomputed_flops=sum(plan.recomputed_flops for plan in plans),
            stash_peak_bytes=course.stash_peak,
        )


def run_course(around: Surroundings, blocks: Sequence[Footprint]) -> Course:
    """Walk through one step of ``blocks`` in call order and find its highest points."""
    points = [*_forward_points(around, blocks), *_backward_points(around, blocks)]
    highest = max(points, key=lambda point: point.stash + point.transient + point.gradients)
    return Course(
        gradients=highest.gradients,
        stash_peak=max(point.stash for point in points),
        device_peak=highest.stash + highest.transient + highest.gradients,
        index=highest.index,
        phase=highest.phase,
    )


@dataclass(frozen=True, slots=True)
class _Point:
    stash: int
    transient: int
    gradients: int
    index: int
    phase: str


def _forward_points(around: Surroundings, blocks: Sequence[Footprint]) -> Iterator[_Point]:
    transient = 1 if around.asynchronous else 0
    kept = outgoing = 0
    for index, block in enumerate(blocks):
        stash = kept + outgoing + block.skeletal
        yield _Point(stash, transient * block.forward_peak, 0, index, "forward")
        if block.stashed:
            sorting = stash + block.kept_rows + block.gathered
            yield _Point(sorting, transient * block.end_peak, 0, index, "end of forward")
        outgoing = block.outgoing if around.asynchronous else 0
        kept += block.kept
    # Compute waits for the last copies before it goes on to the head.
    last = max(0, len(blocks) - 1)
    yield _Point(kept, around.outside_peak, around.outside_gradients, last, "head and loss")


def _backward_points(around: Surroundings, blocks: Sequence[Footprint]) -> Iterator[_Point]:
    """The points of backward, from the top."""
    transient = 1 if around.asynchronous else 0
    stashes = []
    kept = landing = 0
    for block in blocks:
        kept += block.kept
        stashes.append(kept + block.full + (0 if put_off(block, landing) else landing))
        landing = block.landing if block.copies else landing
    there = gradients_above(around, blocks)
    for index in reversed(range(len(blocks))):
        block, stash = blocks[index], stashes[index]
        if block.rerun_peak or block.spent:
            yield _Point(stash, transient * block.rerun_peak, there[index], index, "rerun")
        # What comes behind the last block is not ours, and may keep the gradient that it hands over.
        held = block.held if index == len(blocks) - 1 else 0
        yield _Point(stash - block.spent, transient * (block.backward_peak + held), there[index], index, "backward")
    yield _Point(0, 0, all_gradients(around, blocks), 0, "end of backward")


def put_off(block: Footprint, landing: int) -> bool:
    """Whether what lands for the block below waits until ``block`` has freed room for it; by tiles it does not."""
    return block.stashed and FETCH_PARTS * landing <= block.full - block.spent


def gradients_above(around: Surroundings, blocks: Sequence[Footprint]) -> list[int]:
    """Bytes of gradients that are there when each block goes backward, its own not among them."""
    above = around.outside_gradients
    found = []
    for block in reversed(blocks):
        found.append(above)
        above += block.gradients if around.gradual else 0
    return found[::-1]


def all_gradients(around: Surroundings, blocks: Sequence[Footprint]) -> int:
    """Bytes of gradients at the end of backward that ``base_bytes`` does not contain."""
    inside = sum(block.gradients for block in blocks) if around.gradual else 0
    return around.outside_gradients + around.last_gradients + inside


def step_seconds(around: Surroundings, blocks: Sequence[Footprint]) -> float:
    """Compute, reruns, and the part of every copy that compute cannot hide."""
    compute = sum(block.forward + block.backward + block.again for block in blocks)
    if not around.asynchronous:
        copies = sum(block.to_host + block.to_device for block in blocks)
        return compute + copies + around.outside_seconds
    exposed = 0.0
    for block, cover in zip(blocks, to_host_cover(blocks), strict=True):
        exposed += max(0.0, block.to_host - cover)
    for index, block in enumerate(blocks):
        cover = sum(blocks[above].backward + blocks[above].again for above in to_device_cover(blocks, index))
        exposed += max(0.0, block.to_device - cover)
    return compute + exposed + around.outside_seconds


def to_host_cover(blocks: Sequence[Footprint]) -> list[float]:
    """Seconds of compute behind which each block's copies to the host hide: the forward of the next block.

    Nothing hides those of the last block: compute waits for them before it goes on to the head.
    """
    return [block.forward for block in blocks[1:]] + [0.0] * min(1, len(blocks))


def to_device_cover(blocks: Sequence[Footprint], index: int) -> range:
    """Blocks in whose backward the fetch of block ``index`` hides.

    The fetch starts with the backward of the first block above for which this is the nearest lower block that
    has
    copies: kept blocks above a swapped one all help, and nothing hides the fetch of the last block.
    """
    above = index + 1
    while above < len(blocks) and not blocks[above].copies:
        above += 1
    return range(index + 1, min(above + 1, len(blocks)))
