"""Calibrating one block: what it saves, what a rerun needs, and whether a rerun on a token slice is exact.

Everything runs on a short crop of the block's real arguments, detached, and from the same state every time
(profiling/start.py). A block that is like one that was calibrated before is only compared with it
(profiling/likeness.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import is_tensor, nn

from memo_runtime.blocks.cache import HOLDS_TOKENS
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.failures import BlockRefusedError, first_line, pass_on
from memo_runtime.blocks.rerun import Forward
from memo_runtime.profiling.compare import Lengths
from memo_runtime.profiling.growth import fit_counts
from memo_runtime.profiling.inventory import take_inventory
from memo_runtime.profiling.likeness import Example, like_one_of, structure_of
from memo_runtime.profiling.observe import Observation, observe
from memo_runtime.profiling.slicing import Slicing, full_values, tail_values
from memo_runtime.profiling.start import Start
from memo_runtime.profiling.storages import with_growth
from memo_runtime.profiling.trial import (
    Subject,
    Trial,
    base_profile,
    last_save,
    run_trial,
    search,
    shorter_lengths,
    shorter_runs,
    whole_flops,
)
from memo_runtime.profiling.unsliced import SAVES_ELSE, same_saves, unsliced
from memo_runtime.records import ArgumentAxes, BlockProfile


def calibrate(
    block: nn.Module,
    forward: Forward,
    call: BlockCall,
    start: Start,
    *,
    name: str,
    stack: int,
    examples: list[Example],
) -> BlockProfile:
    """What ``block`` saves when called with ``call``, without times.

    Args:
        block: the module.
        forward: its own forward.
        call: the live arguments at full length; only a crop is used.
        start: the state that every run starts from.
        name: qualified name for the record. stack: index of its stack.
        examples: blocks that were calibrated so far; this one is added, unless it is like one of them.

    Raises:
        BlockRefusedError: what it saves cannot be seen.
    """
    leaf = call.input_leaf
    if leaf is None or call.is_empty:
        raise BlockRefusedError("its input is empty" if call.is_empty else _without_input(call))
    if call.caches()[1]:
        raise BlockRefusedError(HOLDS_TOKENS)
    subject = Subject(block, start.every_time(forward), call, leaf, name, stack)
    structure = structure_of(subject)
    with start.kept(), torch.enable_grad():
        profile = like_one_of([example for example in examples if example.structure == structure], subject)
        if profile is None:
            profile, trial, reason = _calibrated(subject)
            examples.append(Example.of(subject, profile, trial, reason))
    return replace(profile, stateful=start.wrote, draws=start.drew)


def _without_input(call: BlockCall) -> str:
    """Why a call has no input hidden state."""
    objects = [type(leaf).__name__ for leaf in call.leaves if hasattr(leaf, "__dict__") and not is_tensor(leaf)]
    inside = f": tensors inside a {objects[0]} are not seen, and those of a plain dataclass are" if objects else ""
    return f"it has no argument of numbers with tokens{inside}"


def _calibrated(subject: Subject) -> tuple[BlockProfile, Trial, str]:
    """The profile, the runs that it was made from, and why no slice serves ("": one does)."""
    trial, reason = search(subject)
    if trial is None:
        # Not even a crop runs (a window that divides the length): look at the whole, once.
        default = 1 if subject.hidden.dim() > 2 else 0
        arguments = (ArgumentAxes(leaf=subject.input_leaf, dims=(default,)),)
        call = subject.call.detached(fresh=(subject.input_leaf,))
        lengths = Lengths(whole=subject.hidden.shape[default], start=0)
        trial = Trial(default, arguments, lengths, call, observe(subject.forward, call), Slicing(reason=reason))
    unseen = trial.whole.unseen(trial.call, subject.block)
    if unseen:
        raise BlockRefusedError(unseen)
    if not trial.whole.saved:
        return _without_saves(subject, trial), trial, reason
    if not reason:
        try:
            again = _at_full_length(subject, trial)
            if same_saves(again, trial.whole):
                return _sliced(subject, trial, again), trial, ""
            reason = SAVES_ELSE
        except Exception as error:
            pass_on(error)
            # A scan in chunks may take slices of some lengths alone.
            reason = f"slices of other lengths do not run: {first_line(error)}"
        trial.slicing = Slicing(reason=reason)
    return unsliced(subject, trial, reason), trial, reason


def calibrate_again(
    block: nn.Module, forward: Forward, call: BlockCall, known: BlockProfile, start: Start
) -> BlockProfile | None:
    """What ``known``'s block saves on ``call``, which differs from its own in the number of sequences.

    Token dimensions are those of ``known``. None: it is not the same there, sliceable where it was not or not where it
    was.

    Raises:
        Exception: whatever the block raises on ``call``.
    """
    subject = Subject(block, start.every_time(forward), call, known.input_leaf, known.name, known.stack)
    with start.kept(), torch.enable_grad():
        # One that is run again as a whole may have too few tokens for a slice, or be wrong on one.
        reason = known.reason if known.dynamic else ""
        trial = run_trial(subject, known.token_dim, known.arguments, unsliced=reason)
        if not trial.whole.saved:
            return None if known.groups else _without_saves(subject, trial)
        if known.dynamic:
            return unsliced(subject, trial, known.reason)
        if trial.slicing.reason:
            return None
        again = _at_full_length(subject, trial)
        return _sliced(subject, trial, again) if same_saves(again, trial.whole) else None


def _without_saves(subject: Subject, trial: Trial) -> BlockProfile:
    """A block without a backward, such as a frozen one below all that trains: there is nothing to stash for it."""
    forward_flops, _ = whole_flops(subject, shorter_runs(subject, trial))
    return replace(base_profile(subject, trial), sliceable=True, replayable=True, forward_flops=forward_flops)


def _at_full_length(subject: Subject, trial: Trial) -> Observation:
    """A rerun of all tokens, with pins."""
    values = full_values(trial.whole, trial.slicing)
    last = last_save(subject, trial.whole)
    return observe(subject.forward, trial.call, values, last=last, unwritten=trial.slicing.final)


def _sliced(subject: Subject, trial: Trial, again: Observation) -> BlockProfile:
    inventory = take_inventory(
        subject.block, trial.call, trial.whole, trial.slicing,
        input_leaf=subject.input_leaf, token_dim=trial.token_dim,
    )  # fmt: skip
    last = last_save(subject, trial.whole)
    points = [(trial.lengths.whole, again.flops)]
    for length in shorter_lengths(trial):
        start = trial.lengths.whole - length
        lengths = replace(trial.lengths, start=start)
        tail = trial.call.cut(trial.arguments, start, trial.lengths.whole)
        points.append((length, _tail_flops(subject, trial, tail, lengths, last)))
    runs = shorter_runs(subject, trial)
    forward_flops, recompute_flops = whole_flops(subject, runs)
    return replace(
        base_profile(subject, trial),
        saved=tuple(inventory.saved),
        groups=tuple(with_growth(inventory.groups, inventory.saved, inventory.pins, runs)),
        pins=tuple(inventory.pins),
        sliceable=True,
        replayable=True,
        forward_flops=forward_flops,
        rerun_flops=fit_counts(points),
        recompute_flops=recompute_flops,
    )


def _tail_flops(subject: Subject, trial: Trial, tail: BlockCall, lengths: Lengths, last: int | None) -> int:
    values = tail_values(trial.whole, trial.slicing, lengths)
    return observe(subject.forward, tail, values, last=last, unwritten=trial.slicing.final).flops
