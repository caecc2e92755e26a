"""Blocks that are only ever run again as a whole: what is stored is found by storage at every call."""

from __future__ import annotations

from dataclasses import replace

from memo_runtime.blocks.ambient import RandomState
from memo_runtime.profiling.bundles import bundles, bundles_at, count_bundles
from memo_runtime.profiling.compare import close
from memo_runtime.profiling.growth import fit_counts
from memo_runtime.profiling.observe import Observation, observe
from memo_runtime.profiling.slicing import Slicing, full_values, named_pins, written_unseen
from memo_runtime.profiling.trial import (
    Subject,
    Trial,
    base_profile,
    last_save,
    rerun_end,
    shorter_runs,
    whole_flops,
)
from memo_runtime.records import BlockProfile, Pin

SAVES_ELSE = "run again at full length with its mixers replaced, it saves something else"


def unsliced(subject: Subject, trial: Trial, reason: str, *, like: BlockProfile | None = None) -> BlockProfile:
    """The profile of a block that no slice serves, for ``reason``; ``like``: that of a block that may be like it."""
    pins = named_pins(trial.whole)
    values = full_values(trial.whole, Slicing(pins=pins))
    again = observe(subject.forward, trial.call, values, last=last_save(subject, trial.whole))
    never = bool(trial.whole.never_again)
    replayable = not (trial.whole.walked or never or written_unseen(trial.whole, pins))
    replayable = replayable and same_saves(again, trial.whole)
    rerunnable = not never and (replayable or _rerunnable(subject, trial))
    if never:
        reason += ": nothing of it is run again"
    elif not replayable and not trial.whole.walked and reason != SAVES_ELSE:
        reason += f"; {SAVES_ELSE}"
    if not rerunnable and not never:
        reason += "; nothing of it is run again, since a second run as a whole is not the first"
    sizes = like if like is not None and _alike(subject, trial, like) else _measured(subject, trial)
    return replace(
        base_profile(subject, trial),
        groups=sizes.groups,
        pins=tuple(Pin(op=key[0], call=key[1], output=0, kind=kind) for key, kind in pins.items()),
        replayable=replayable,
        rerunnable=rerunnable,
        inner_autograd=trial.whole.walked,
        dynamic=True,
        reason=reason,
        forward_flops=sizes.forward_flops,
        # Without its mixers a rerun costs in proportion to the tokens.
        rerun_flops=fit_counts([(trial.lengths.whole, again.flops)]),
        recompute_flops=sizes.recompute_flops,
    )


def same_saves(a: Observation, b: Observation) -> bool:
    """Two runs have saved the same tensors, as far as rounding lets that be told."""
    return len(a.saved) == len(b.saved) and all(close(x, y) for x, y in zip(a.saved, b.saved, strict=True))


def _rerunnable(subject: Subject, trial: Trial) -> bool:
    """Two runs as a whole from the same random state save the same, and leave no gradients behind."""
    start = RandomState.current(subject.hidden.device)
    first = observe(subject.forward, trial.call)
    start.set()
    second = observe(subject.forward, trial.call)
    return same_saves(first, second) and all(parameter.grad is None for parameter in subject.block.parameters())


def _alike(subject: Subject, trial: Trial, like: BlockProfile) -> bool:
    """``trial`` took what ``like`` says."""
    tokens = trial.lengths.whole
    flops = like.forward_flops.at(tokens), like.recompute_flops.at(tokens)
    if flops != (trial.whole.flops, rerun_end(subject, trial.whole)):
        return False
    return bundles_at(like.groups, tokens) == count_bundles(subject, trial)


def _measured(subject: Subject, trial: Trial) -> BlockProfile:
    """Groups and FLOPs by tokens."""
    runs = shorter_runs(subject, trial)
    forward_flops, recompute_flops = whole_flops(subject, runs)
    return replace(
        base_profile(subject, trial),
        groups=bundles(subject, runs),
        forward_flops=forward_flops,
        recompute_flops=recompute_flops,
    )
