"""One run of a block on a short crop, the slice that is tried with it, and what is counted there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.failures import first_line, pass_on
from memo_runtime.blocks.operators import draws
from memo_runtime.blocks.rerun import Forward, stops_early
from memo_runtime.profiling.candidates import MIN_TOKENS, argument_axes, token_dims
from memo_runtime.profiling.compare import Lengths
from memo_runtime.profiling.growth import fit_counts
from memo_runtime.profiling.observe import Observation, observe
from memo_runtime.profiling.slicing import Slicing, find_slicing
from memo_runtime.records import ArgumentAxes, BlockProfile, Growth

#: Tokens of the crop: enough to tell token dimensions from others, few enough to hold every operator's result, and no
#: multiple of what kernels pad to, so that a padded dimension does not look like one that grows with tokens.
CROP_TOKENS = {"cuda": 509, "cpu": 251}

_INNER_AUTOGRAD = "its forward calls autograd itself (torch.autograd.grad or backward)"


@dataclass(slots=True)
class Subject:
    """The block under calibration."""

    block: nn.Module
    forward: Forward
    call: BlockCall
    input_leaf: int
    name: str
    stack: int

    @property
    def hidden(self) -> torch.Tensor:
        """The input hidden state."""
        tensor = self.call.leaves[self.input_leaf]
        assert isinstance(tensor, torch.Tensor), "the input leaf is a tensor"
        return tensor

    @property
    def limit(self) -> int:
        """Most tokens of a crop."""
        return crop_tokens(self.hidden.device.type)

    def crop(self, arguments: tuple[ArgumentAxes, ...], tokens: int) -> BlockCall:
        """The call on the first ``tokens`` tokens, detached, its input packed and of its own."""
        return self.call.cut(arguments, 0, tokens).detached(fresh=(self.input_leaf,))


@dataclass(slots=True)
class Trial:
    """One assignment of token dimensions that ran."""

    token_dim: int
    arguments: tuple[ArgumentAxes, ...]
    lengths: Lengths
    call: BlockCall
    whole: Observation
    slicing: Slicing


def crop_tokens(device_type: str) -> int:
    """Most tokens of a crop."""
    return CROP_TOKENS.get(device_type, CROP_TOKENS["cpu"])


def _slice_start(tokens: int) -> int:
    """First token of the slice: about two fifths in, such that the slice's length is odd."""
    start = max(1, tokens * 2 // 5)
    return start if (tokens - start) % 2 else max(1, start - 1)


def run_whole(subject: Subject, token_dim: int, arguments: tuple[ArgumentAxes, ...]) -> Trial:
    """The block on a crop, and no slice of it yet."""
    hidden = subject.hidden
    tokens = min(hidden.shape[token_dim], subject.limit)
    start = _slice_start(tokens) if tokens >= MIN_TOKENS else 0
    before, after = tuple(hidden.shape[:token_dim]), tuple(hidden.shape[token_dim + 1 :])
    lengths = Lengths(whole=tokens, start=start, before=before, after=after)
    call = subject.crop(arguments, tokens)
    return Trial(token_dim, arguments, lengths, call, observe(subject.forward, call), Slicing())


def run_trial(
    subject: Subject, token_dim: int, arguments: tuple[ArgumentAxes, ...], *, unsliced: str = ""
) -> Trial:
    """The block on a crop and on a slice of that. ``unsliced``: why no slice is tried; "": one is."""
    trial = run_whole(subject, token_dim, arguments)
    if trial.whole.walked or unsliced:
        trial.slicing = Slicing(reason=unsliced or _INNER_AUTOGRAD)
    elif trial.whole.never_again:
        trial.slicing = Slicing(reason=trial.whole.never_again)
    else:
        trial.slicing = find_slicing(subject.forward, trial.call, trial.whole, arguments, trial.lengths)
    return trial


def search(subject: Subject) -> tuple[Trial | None, str]:
    """The best assignment: sliceable with a mixer, else sliceable, else the first that ran; and the first reason."""
    best: Trial | None = None
    first: Trial | None = None
    reason = ""
    for token_dim in token_dims(subject.hidden):
        for arguments in argument_axes(subject.call, subject.input_leaf, token_dim):
            try:
                trial = run_trial(subject, token_dim, arguments)
            except Exception as error:
                pass_on(error)
                reason = reason or f"it does not run on fewer tokens: {first_line(error)}"
                continue
            first = first or trial
            if trial.slicing.reason:
                reason = reason or trial.slicing.reason
                continue
            if trial.slicing.mixes:
                return trial, ""
            best = best or trial
            break
    if best is not None:
        return best, ""
    return first, reason or f"its input {tuple(subject.hidden.shape)} has no dimension of {MIN_TOKENS} tokens to slice"


# ---- what is counted


def base_profile(subject: Subject, trial: Trial) -> BlockProfile:
    """What every profile of the block says, sliceable or not."""
    return BlockProfile(
        name=subject.name,
        kind=type(subject.block).__name__,
        stack=subject.stack,
        tokens=subject.hidden.shape[trial.token_dim],
        token_dim=trial.token_dim,
        input_leaf=subject.input_leaf,
        arguments=trial.arguments,
        random=any(draws(record.key[0]) for record in trial.whole.operators),
    )


def last_save(subject: Subject, observation: Observation) -> int | None:
    """Index of the saved tensor with which a rerun ends; None: it runs to the block's end."""
    return len(observation.saved) - 1 if stops_early(subject.block) and not observation.walked else None


def shorter_lengths(trial: Trial) -> tuple[int, ...]:
    """Two lengths below the crop's, for counts that grow with the square of the length.

    The slice's is one, which has run already: libraries choose their kernels anew for every length.
    """
    tokens = trial.lengths.whole
    others = dict.fromkeys([trial.lengths.part, tokens - tokens // 2, tokens - tokens // 4])
    return tuple(sorted([length for length in others if length < tokens][:2]))


def rerun_end(subject: Subject, whole: Observation) -> int:
    """FLOPs of a rerun without pins: the forward up to its last save, so that no run of its own is needed."""
    return whole.flops if last_save(subject, whole) in (None, -1) else whole.flops_to_last_save


def shorter_runs(subject: Subject, trial: Trial) -> list[Trial]:
    """The trial's whole at the shorter lengths at which the block runs, and that itself."""
    runs = []
    for length in shorter_lengths(trial) if trial.lengths.start else ():
        call = subject.crop(trial.arguments, length)
        try:
            whole = observe(subject.forward, call)
        except Exception as error:
            pass_on(error)
            continue
        runs.append(replace(trial, lengths=Lengths(whole=length, start=0), call=call, whole=whole))
    return [*runs, trial]


def whole_flops(subject: Subject, runs: Sequence[Trial]) -> tuple[Growth, Growth]:
    """(FLOPs of a forward, FLOPs of a rerun without pins), from ``shorter_runs``."""
    forward = [(run.lengths.whole, run.whole.flops) for run in runs]
    return fit_counts(forward), fit_counts([(run.lengths.whole, rerun_end(subject, run.whole)) for run in runs])
