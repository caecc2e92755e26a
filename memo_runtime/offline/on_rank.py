"""A kind of block as one of several GPUs runs it: seconds and transient memory at one length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from memo_runtime.machines.machine import Machine
from memo_runtime.offline.kinds import Kind
from memo_runtime.offline.measure import BlockRun
from memo_runtime.offline.ranks import Ranks
from memo_runtime.offline.tiles import with_attention
from memo_runtime.offline.timing import attention_seconds, per_token, seconds_of, total
from memo_runtime.profiling.growth import fit_peak, polynomial_bytes
from memo_runtime.profiling.writing import written_bytes
from memo_runtime.records import BlockProfile, Growth, Moment, Role, TiledProfile
from memo_runtime.sizes import stored_bytes


def on_rank(
    kind: Kind, machine: Machine, ranks: Ranks, local: int, tiled: TiledProfile | None = None
) -> BlockProfile:
    """The profile of a block of ``kind`` on one of ``ranks``, with seconds and transient memory.

    ``tiled``: what the kind takes by tiles, its attention not timed.
    """
    profile, runs = kind.profile, kind.runs_for(local * ranks.gpus)
    if not profile.tokens:
        return profile
    stay = (Role.PARAMETER, Role.SHARED, Role.INPUT)
    saved = [group for group in profile.groups if group.saved and group.role not in stay]
    curved = any(group.size.quadratic for group in profile.groups)

    def peak(of: Callable[[BlockRun], int], *, beyond_saved: bool, buffers: int, constant: int) -> Growth:
        points = [(r.tokens, of(r) - (stored_bytes(saved, r.tokens) if beyond_saved else 0)) for r in runs]
        fitted = fit_peak(points, curved=curved)
        return replace(fitted, constant=fitted.constant + constant, linear=fitted.linear + buffers)

    gpus, heads = ranks.gpus, runs[-1].heads
    buffers = ranks.buffers(heads)
    # A gradient is reduced out of a copy beside it.
    reduced = kind.gradients if gpus > 1 else 0
    forward = seconds_of([(r.tokens, r.forward) for r in runs], machine, tokens=local, gpus=gpus, backward=False)
    backward = seconds_of([(r.tokens, r.backward) for r in runs], machine, tokens=local, gpus=gpus, backward=True)
    rerun = seconds_of([(r.tokens, r.rerun) for r in runs], machine, tokens=local, gpus=gpus, backward=False)
    rate = machine.gpu_rate
    exchange = per_token(ranks.exchanged(heads), rate)
    gather = ranks.others * kind.weights / rate
    scatter = ranks.others * kind.gradients / rate
    waits = (
        (_beyond(gather, forward.exact(local)), _beyond(gather + scatter, backward.exact(local)))
        if ranks.ulysses
        else (
            _beyond(exchange.exact(local) + gather, forward.exact(local)),
            _beyond(2 * exchange.exact(local) + gather + scatter, backward.exact(local)),
        )
    )
    hidden = 0.0 if not ranks.ulysses else 1.0
    waiting = [total((exchange, hidden), (Growth(constant=wait), 1)) for wait in waits]
    attention = [
        attention_seconds([(r.tokens, work) for r, work in pairs], machine, tokens=local, gpus=gpus, backward=backward)
        for backward, pairs in ((False, [(r, r.forward) for r in runs]), (True, [(r, r.backward) for r in runs]))
    ]
    with_waits = [total((one, 1), (wait, 1)) for one, wait in zip(attention, waiting, strict=True)]
    return replace(
        profile,
        tiled=None if tiled is None else _tiles_on_rank(kind, tiled, ranks, with_waits),
        tokens=local,
        forward_seconds=total((forward, 1), (waiting[0], 1)),
        backward_seconds=total((backward, 1), (waiting[1], 1)),
        rerun_seconds=rerun,
        write_seconds=per_token(_written(profile, local), machine.memory_rate * machine.shares.elementwise),
        forward_flops=_rank_flops(profile.forward_flops, gpus),
        recompute_flops=_rank_flops(profile.recompute_flops, gpus),
        forward_peak=peak(lambda r: r.forward_peak, beyond_saved=True, buffers=buffers, constant=0),
        backward_peak=peak(lambda r: r.backward_peak, beyond_saved=True, buffers=buffers, constant=reduced),
        rerun_peak=peak(lambda r: r.rerun_peak, beyond_saved=False, buffers=0, constant=0),
        output=polynomial_bytes(runs[-1].output, runs[-1].tokens, 1),
        timed_tokens=local,
    )


def _tiles_on_rank(kind: Kind, tiled: TiledProfile, ranks: Ranks, added: Sequence[Growth]) -> TiledProfile:
    """``tiled`` on one of ``ranks``; ``added``: seconds of attention, and for other ranks, in forward and backward."""
    timed = with_attention(tiled, *added)
    buffers, reduced = ranks.buffers(kind.runs[-1].heads), kind.gradients if ranks.gpus > 1 else 0
    return replace(
        timed,
        again_flops=_rank_flops(timed.again_flops, ranks.gpus),
        # What attention is given comes from other ranks, and nothing is known of what it takes to leave it there.
        mixer_input_flops=timed.mixer_input_flops if ranks.gpus == 1 else Growth(),
        forward=tuple(_beside(one, buffers, 0) for one in timed.forward),
        backward=tuple(_beside(one, buffers, reduced) for one in timed.backward),
        forward_by_groups=tuple(_beside(one, buffers, 0) for one in timed.forward_by_groups),
        backward_by_groups=tuple(_beside(one, buffers, reduced) for one in timed.backward_by_groups),
    )


def _beside(moment: Moment, buffers: int, reduced: int) -> Moment:
    """``moment`` with what ranks exchange, by token, and the copy out of which a gradient is reduced."""
    full = replace(moment.full, linear=moment.full.linear + buffers)
    return replace(moment, full=full, fixed=moment.fixed + reduced)


def _beyond(seconds: float, cover: float) -> float:
    """What of a transfer its cover does not hide."""
    return max(0.0, seconds - cover)


def _written(profile: BlockProfile, tokens: int) -> float:
    """Bytes that are read and written for every token that is put behind a prefix."""
    return 2 * sum(written_bytes(profile, tokens)) / tokens


def _rank_flops(flops: Growth, gpus: int) -> Growth:
    return replace(flops, quadratic=flops.quadratic * gpus)


