"""Blocks that are only ever run again as a whole: what is stored is found by storage at every call."""

from __future__ import annotations

from dataclasses import replace

import torch

from memo_runtime.blocks.ambient import RandomState
from memo_runtime.blocks.rerun import parameter_storages, storage_key
from memo_runtime.profiling.compare import close
from memo_runtime.profiling.growth import fit_counts, polynomial_bytes
from memo_runtime.profiling.observe import Observation, observe
from memo_runtime.profiling.slicing import full_values, named_pins
from memo_runtime.profiling.trial import Subject, Trial, base_profile, last_save, whole_flops
from memo_runtime.records import BlockProfile, Growth, Pin, PinKind, Role, TensorGroup


def unsliced(
    subject: Subject, trial: Trial, reason: str, *, flops: tuple[Growth, Growth] | None = None
) -> BlockProfile:
    """The profile of a block that no slice serves, for ``reason``; ``flops`` as ``whole_flops`` has them, if known."""
    pins = named_pins(trial.whole)
    values = full_values(trial.whole, pins)
    again = observe(subject.forward, trial.call, values, last=last_save(subject, trial.whole))
    early = bool(trial.whole.saved_early)
    replayable = not (trial.whole.walked or early) and _same_saves(again, trial.whole)
    rerunnable = not early and (replayable or _rerunnable(subject, trial))
    if early:
        reason += ", where a rerun would take it as it is before: nothing of it is run again"
    elif not replayable and not trial.whole.walked:
        reason += "; run again at full length with its mixers replaced, it saves something else"
    if not rerunnable and not early:
        reason += "; nothing of it is run again, since a second run as a whole is not the first"
    forward_flops, recompute_flops = flops or whole_flops(subject, trial)
    return replace(
        base_profile(subject, trial),
        groups=tuple(_dynamic_groups(subject, trial, pins)),
        pins=tuple(Pin(op=key[0], call=key[1], output=0, kind=kind) for key, kind in pins.items()),
        replayable=replayable,
        rerunnable=rerunnable,
        inner_autograd=trial.whole.walked,
        dynamic=True,
        reason=reason,
        forward_flops=forward_flops,
        # Without its mixers a rerun costs in proportion to the tokens.
        rerun_flops=fit_counts([(trial.lengths.whole, again.flops)]),
        recompute_flops=recompute_flops,
    )


def _same_saves(a: Observation, b: Observation) -> bool:
    return len(a.saved) == len(b.saved) and all(close(x, y) for x, y in zip(a.saved, b.saved, strict=True))


def _rerunnable(subject: Subject, trial: Trial) -> bool:
    """Two runs as a whole from the same random state save the same, and leave no gradients behind."""
    start = RandomState.current(subject.hidden.device)
    first = observe(subject.forward, trial.call)
    start.set()
    second = observe(subject.forward, trial.call)
    return _same_saves(first, second) and all(parameter.grad is None for parameter in subject.block.parameters())


def _dynamic_groups(subject: Subject, trial: Trial, pins: dict[tuple[str, int], PinKind]) -> list[TensorGroup]:
    tokens = trial.lengths.whole
    hidden = trial.call.leaves[subject.input_leaf]
    size = hidden.untyped_storage().nbytes()
    seen = {storage_key(hidden)}
    kept = trial.whole.derived_storages(parameter_storages(subject.block))
    kept |= {storage_key(t) for _, t in trial.call.tensors()}
    input_saved = any(storage_key(tensor) in seen for tensor in trial.whole.saved)
    groups = [TensorGroup(role=Role.INPUT, size=polynomial_bytes(size, tokens, 1), saved=input_saved, splits=False)]
    records = trial.whole.by_key()
    saved_storages = {storage_key(tensor) for tensor in trial.whole.saved}
    for key, kind in pins.items():
        for value in records[key].pin_values().values():
            if not isinstance(value, torch.Tensor) or not value.numel() or storage_key(value) in seen | kept:
                continue
            seen.add(storage_key(value))
            groups.append(
                TensorGroup(
                    role=Role.MIXER if kind == PinKind.MIXER else Role.RANDOM,
                    size=polynomial_bytes(value.untyped_storage().nbytes(), tokens, 1 if value.numel() > 1 else 0),
                    saved=storage_key(value) in saved_storages,
                    splits=False,
                )
            )
    others = [tensor for tensor in trial.whole.saved if storage_key(tensor) not in seen | kept]
    rest = {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in others}
    if rest:
        groups.append(
            TensorGroup(
                role=Role.WHOLE, size=polynomial_bytes(sum(rest.values()), tokens, 1), splits=False, estimated=True
            )
        )
    return groups
