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
all of them at the end, beside what embeddings take to go backward. In a step that starts with gradients (accumulation)
all are there at every point. Behind that, with all gradients and nothing of the blocks, the optimizer's step has its
temporaries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memo_runtime.planning.footprint import NO_PRODUCTS, Footprint
from memo_runtime.records import FETCH_PARTS, RESIDENT_ROLES, Profile, Stretch
from memo_runtime.sizes import WITNESS_ROWS
from memo_runtime.units import MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The highest points of a step.

    ``stash_peak`` counts what the runtime holds; ``device_peak`` adds what blocks, head and loss need while
    they run and gradients, and was reached in ``phase`` ("forward", "end of forward", "rerun", "backward",
    "head and loss", "end of backward", "optimizer's step") of block ``index``. ``gradients`` are the bytes of
    gradients there.
    """

    gradients: int
    stash_peak: int
    device_peak: int
    index: int
    phase: str


#: Of a free block that is at most this much larger than a request PyTorch's allocator splits nothing off, and counts
#: all of it as allocated (``kSmallSize``, c10/cuda/CUDACachingAllocator.cpp; expandable segments split everything).
_UNSPLIT = MiB
#: It rounds small requests up to this.
_SMALLEST = 512
#: Bytes of a sum in float32 for each of a 16-bit gradient.
_WIDER = 2


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
        outside_peak: bytes of head and loss while they go backward; 0 where no allocator counts (CPU). loss_peak:
            likewise, of a loss that runs by tiles in the forward, beside ``outside_gradients``. stepping: likewise, of
            the optimizer's step. embedding_peak: likewise, of the backward of embeddings. held: who made the gradient
            that the last block gets may keep it. result: of what the model returned, which its caller may hold until
            backward is over. entry: of ``base_bytes``, what the first block is given, where it is gone when blocks go
            backward.
    """

    asynchronous: bool
    base_bytes: int
    gradual: bool
    outside_gradients: int
    last_gradients: int
    outside_peak: int
    outside_seconds: float
    loss_peak: int = 0
    stepping: int = 0
    embedding_peak: int = 0
    held: bool = True
    result: int = 0
    entry: int = 0

    @classmethod
    def of(
        cls, profile: Profile, tokens: int, *, accumulating: bool = False, norm_by_tiles: bool = False
    ) -> Surroundings:
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
        outside_peak, loss_peak = profile.end(tokens, by_tiles=norm_by_tiles) if asynchronous else (0, 0)
        return cls(
            asynchronous=asynchronous,
            base_bytes=base,
            gradual=gradual,
            outside_gradients=outside,
            last_gradients=last,
            outside_peak=outside_peak,
            # Before there is a gradient of the head.
            loss_peak=max(0, loss_peak - outside),
            outside_seconds=profile.outside_seconds.exact(tokens),
            stepping=states.stepping if asynchronous else 0,
            embedding_peak=_embedding_peak(profile, tokens) if gradual else 0,
            held=not profile.norm_behind,
            result=profile.result.at(tokens) if asynchronous else 0,
            entry=profile.entry.at(tokens) if asynchronous else 0,
        )


def _embedding_peak(profile: Profile, tokens: int) -> int:
    """Bytes beside all gradients while embeddings go backward, where gradients come gradually.

    On a GPU PyTorch sums rows in float32, a tenth of the tokens' and one for each that occurs, beside the gradient of
    the hidden states. Of a table that is a head as well there are two gradients then, and their sum is a third.
    """
    states = profile.states
    last, tied = states.gradients_last, states.gradients_tied
    if not (last or tied) or not profile.blocks:
        return 0
    hidden = profile.blocks[-1].output.at(tokens)
    read = hidden + hidden // 10 * _WIDER + _WIDER * min(hidden, max(last, tied))
    return max(read + tied, 2 * tied)


def run_course(around: Surroundings, blocks: Sequence[Footprint]) -> Course:
    """Walk through one step of ``blocks`` in call order and find its highest points."""
    forward, backward = [*_forward_points(around, blocks)], [*_backward_points(around, blocks)]
    points, entry = [*forward, *backward], _entry(around, blocks)
    # Where it is gone by then, what the first block keeps of it is there beside nothing else.
    gone = around.entry or entry
    in_all = [stash + transient + there - (entry if stash else 0) for stash, transient, there, _, _ in forward]
    in_all += [
        stash + transient + there - (gone if stash or around.entry else 0)
        for stash, transient, there, _, _ in backward
    ]
    device_peak = max(in_all)
    _, _, gradients, index, phase = points[in_all.index(device_peak)]
    stash_peak = max(point[0] for point in points)
    return Course(gradients=gradients, stash_peak=stash_peak, device_peak=device_peak, index=index, phase=phase)


def bytes_at_head(around: Surroundings, blocks: Sequence[Footprint]) -> int:
    """Of the points of ``run_course`` the one between forward and backward, which no walk leads to."""
    kept, entry = sum(block.kept for block in blocks), _entry(around, blocks)
    loss = around.loss_peak - (entry if kept else 0)
    behind = around.outside_peak - (around.entry or (entry if kept else 0))
    return kept + around.outside_gradients + max(loss, behind)


def _entry(around: Surroundings, blocks: Sequence[Footprint]) -> int:
    """What the first block is given was counted before it: with the batch, or around the blocks."""
    return blocks[0].entry if blocks and around.asynchronous else 0


#: (stash, transient bytes, gradients, index of the block, phase) at one moment. Planning takes the most of millions
#: of them, so they are plain tuples.
_Point = tuple[int, int, int, int, str]


def _forward_points(around: Surroundings, blocks: Sequence[Footprint]) -> Iterator[_Point]:
    transient = 1 if around.asynchronous else 0
    kept = outgoing = 0
    before = NO_PRODUCTS
    for index, block in enumerate(blocks):
        sent = block.sent
        departing = min(sent.total + before.total, max(sent.under_way, before.under_way)) * transient
        stash = kept + outgoing + departing + block.skeletal
        yield stash, transient * block.forward_peak, 0, index, "forward"
        if block.stashed:
            yield stash + block.kept_rows + block.gathered, transient * block.end_peak, 0, index, "end of forward"
        outgoing = block.outgoing * transient
        kept += block.kept
        before = sent
    # Compute waits for the last copies before it goes on to the head.
    last = max(0, len(blocks) - 1)
    yield kept, around.loss_peak, around.outside_gradients, last, "head and loss"


def _backward_points(around: Surroundings, blocks: Sequence[Footprint]) -> Iterator[_Point]:
    """The points of backward, from the top."""
    transient = 1 if around.asynchronous else 0
    kept = sum(block.kept for block in blocks)
    yield kept, around.outside_peak, around.outside_gradients, max(0, len(blocks) - 1), "head and loss"
    fetched, stashes = _fetched_and_stashed(blocks)
    there = gradients_above(around, blocks)
    passed = _passed(blocks)
    top = True
    for index in reversed(range(len(blocks))):
        block, stash, gradients = blocks[index], stashes[index], there[index]
        if block.late:
            for held, peak in passed[index].highest:
                beside = transient * peak + around.result
                yield stash - block.full + held, beside, gradients, index, "input made again"
        elif top and passed[index].peak:
            beside = transient * passed[index].peak + around.result
            yield stash + block.sent.first, beside, gradients, index, "input made again"
        top = not block.from_below
        if block.rerun_peak or block.spent:
            yield stash, transient * block.rerun_peak + around.result, gradients, index, "rerun"
        held = held_behind(around, block, last=index == len(blocks) - 1)
        for stretch, peak, landed in block.stretches:
            # The block below is fetched when products are back, and its first ones when attention is over.
            waiting = fetched[index] if stretch is Stretch.EARLY and block.sent.total else 0
            first = blocks[index - 1].sent.first if stretch is Stretch.LATE and index else 0
            held_stash, rest = stash - waiting + first + landed, peak - landed + held
            yield held_stash, transient * rest, gradients, index, "backward"
        if not block.stretches:
            yield stash - block.spent, transient * (block.backward_peak + held), gradients, index, "backward"
    yield 0, around.result + around.embedding_peak, all_gradients(around, blocks), 0, "end of backward"
    yield 0, around.stepping + around.result, all_gradients(around, blocks), 0, "optimizer's step"


def held_behind(around: Surroundings, block: Footprint, *, last: bool) -> int:
    """Bytes that others hold while ``block`` goes backward, beyond what was seen when it was timed with its result.

    They are of what the model returned; and who made the gradient that the last block is handed may keep it, which a
    norm does not. Where that is the caller, who gave the gradient of a result, mostly one of both is new in the step.
    """
    if not block.stretches:
        return max(0, around.result - block.output)
    return max(around.result, block.output if around.held and last else 0)


def _fetched_and_stashed(blocks: Sequence[Footprint]) -> tuple[list[int], list[int]]:
    """(what has landed for blocks below, all that is stashed, fetched and made again) when each goes backward.

    Blocks that make their input again have with them all that those below them, down to the first that does not, have
    in host memory and make again; the fetch for the next ones starts with that first one, or, where it has nothing in
    host memory, with theirs. Late blocks have with them what they need themselves.
    """
    fetched, stashes = [], []
    kept = landing = run = passed_on = 0
    for block in blocks:
        kept += block.kept
        if block.late:
            fetched.append(0)
            stashes.append(kept + block.full)
            run = passed_on = landing = 0
            continue
        if block.from_below:
            fetched.append(passed_on)
            stashes.append(kept + block.full + run + passed_on)
            run, landing = run + block.full, landing + block.landing
            continue
        fetched.append(0 if put_off(block, landing) else landing)
        stashes.append(kept + block.full + fetched[-1])
        run, passed_on = block.full, 0 if block.copies else landing
        landing = block.landing if block.copies else landing
    return fetched, stashes


@dataclass(frozen=True, slots=True)
class _Passed:
    """On the way to the input of a block, made again block by block from below.

    ``peak``: most transient bytes. ``highest``: (what is there of the stash, transient bytes) where most is stashed and
    where there is most in all, with nothing but one block's own there at a time. A block that is given its input has
    passed nothing.
    """

    peak: int = 0
    highest: tuple[tuple[int, int], ...] = ()


_NOTHING = _Passed()


def _passed(blocks: Sequence[Footprint]) -> list[_Passed]:
    found: list[_Passed] = []
    below = _NOTHING
    for index, block in enumerate(blocks):
        if block.from_below:
            lower = blocks[index - 1]
            steps = (*below.highest, (lower.full + lower.result, lower.passing_peak))
            below = _Passed(max(below.peak, lower.passing_peak), (max(steps), max(steps, key=sum)))
        else:
            below = _NOTHING
        found.append(below)
    return found


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


def compute_seconds(blocks: Sequence[Footprint]) -> float:
    """Compute and reruns of the blocks."""
    return sum(block.forward + block.backward + block.again + block.passing for block in blocks)


def step_seconds(around: Surroundings, blocks: Sequence[Footprint]) -> float:
    """Compute, reruns, and the part of every copy that compute cannot hide."""
    compute = compute_seconds(blocks)
    if not around.asynchronous:
        copies = sum(block.to_host + block.to_device + block.sent.copies for block in blocks)
        return compute + copies + around.outside_seconds
    exposed = 0.0
    for block, cover in zip(blocks, to_host_cover(blocks), strict=True):
        exposed += max(0.0, block.to_host + block.sent.left - cover) + block.sent.waits
    together = 0.0
    for index, block in enumerate(blocks):
        if block.late:
            exposed += block.to_device
            continue
        # What inputs are made again of comes with those.
        together = block.to_device + (together if block.from_below else 0.0)
        top = index + 1 == len(blocks) or not blocks[index + 1].from_below
        if top and together:
            cover = sum(blocks[above].backward + blocks[above].again for above in to_device_cover(blocks, index))
            exposed += max(0.0, together - cover)
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
