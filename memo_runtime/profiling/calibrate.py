"""Calibrating one block: what it saves, what a rerun needs, and whether a rerun on a token slice is exact.

Everything runs on a short crop of the block's real arguments, detached, and from the same state every time
(profiling/start.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from memo_runtime.blocks.ambient import RandomState
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.operators import pin_kind
from memo_runtime.blocks.rerun import Forward, parameter_storages, stops_early, storage_key
from memo_runtime.profiling.candidates import MIN_TOKENS, argument_axes, token_dims
from memo_runtime.profiling.compare import Lengths, close
from memo_runtime.profiling.growth import fit_counts, polynomial_bytes
from memo_runtime.profiling.inventory import take_inventory
from memo_runtime.profiling.observe import CROP_ERRORS, Observation, observe
from memo_runtime.profiling.slicing import Slicing, find_slicing, full_values, named_pins, tail_values
from memo_runtime.profiling.start import Start
from memo_runtime.records import ArgumentAxes, BlockProfile, Growth, Pin, PinKind, Role, TensorGroup

#: Tokens of the crop: enough to tell token dimensions from others, few enough to hold every operator's result, and no
#: multiple of what kernels pad to, so that a padded dimension does not look like one that grows with tokens.
CROP_TOKENS = {"cuda": 509, "cpu": 251}

_INNER_AUTOGRAD = "its forward calls autograd itself (torch.autograd.grad or backward)"


@dataclass(slots=True)
class _Subject:
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

    def crop(self, arguments: tuple[ArgumentAxes, ...], tokens: int) -> BlockCall:
        """The call on the first ``tokens`` tokens, detached, its input packed and of its own."""
        return self.call.cut(arguments, 0, tokens).detached(fresh=(self.input_leaf,))


@dataclass(slots=True)
class _Trial:
    """One assignment of token dimensions that ran."""

    token_dim: int
    arguments: tuple[ArgumentAxes, ...]
    lengths: Lengths
    call: BlockCall
    whole: Observation
    slicing: Slicing


def _batch_before(hidden: torch.Tensor, token_dim: int) -> int:
    return int(torch.tensor(hidden.shape[:token_dim]).prod().item()) if token_dim else 1


def _slice_start(tokens: int) -> int:
    """First token of the slice: about two fifths in, such that the slice's length is odd."""
    start = max(1, tokens * 2 // 5)
    return start if (tokens - start) % 2 else max(1, start - 1)


def _try(
    subject: _Subject, token_dim: int, arguments: tuple[ArgumentAxes, ...], limit: int, unsliced: str = ""
) -> _Trial:
    """``unsliced``: why no slice is tried; "": one is."""
    hidden = subject.hidden
    tokens = min(hidden.shape[token_dim], limit)
    start = _slice_start(tokens) if tokens >= MIN_TOKENS else 0
    lengths = Lengths(whole=tokens, start=start, batch=_batch_before(hidden, token_dim))
    call = subject.crop(arguments, tokens)
    whole = observe(subject.forward, call)
    if whole.walked or unsliced:
        return _Trial(token_dim, arguments, lengths, call, whole, Slicing(reason=unsliced or _INNER_AUTOGRAD))
    slicing = find_slicing(subject.forward, call, whole, arguments, lengths)
    return _Trial(token_dim, arguments, lengths, call, whole, slicing)


def _search(subject: _Subject, limit: int) -> tuple[_Trial | None, str]:
    """The best assignment: sliceable with a mixer, else sliceable, else the first that ran; and the first reason."""
    best: _Trial | None = None
    first: _Trial | None = None
    reason = ""
    for token_dim in token_dims(subject.hidden):
        for arguments in argument_axes(subject.call, subject.input_leaf, token_dim):
            try:
                trial = _try(subject, token_dim, arguments, limit)
            except CROP_ERRORS as error:
                reason = reason or f"it does not run on fewer tokens: {type(error).__name__}: {error}"[:200]
                continue
            first = first or trial
            if trial.slicing.reason:
                reason = reason or trial.slicing.reason
                continue
            if trial.slicing.mixers:
                return trial, ""
            best = best or trial
            break
    if best is not None:
        return best, ""
    return first, reason or f"its input {tuple(subject.hidden.shape)} has no dimension of {MIN_TOKENS} tokens to slice"


def calibrate(
    block: nn.Module, forward: Forward, call: BlockCall, start: Start, *, name: str, stack: int
) -> BlockProfile:
    """What ``block`` saves when called with ``call``, without times.

    Args:
        block: the module.
        forward: its own forward.
        call: the live arguments at full length; only a crop is used.
        start: the state that every run starts from.
        name: qualified name for the record. stack: index of its stack.
    """
    leaf = call.input_leaf
    if leaf is None or call.is_empty:
        return BlockProfile(
            name=name, kind=type(block).__name__, stack=stack, tokens=0, token_dim=0, input_leaf=0,
            reason="its input is empty" if call.is_empty else "it has no argument of numbers with tokens",
        )  # fmt: skip
    subject = _Subject(block, start.every_time(forward), call, leaf, name, stack)
    hidden = subject.hidden
    limit = crop_tokens(hidden.device.type)
    with start.kept(), torch.enable_grad():
        trial, reason = _search(subject, limit)
        if trial is None:
            # Not even a crop runs (a window that divides the length): look at the whole, once.
            default = 1 if hidden.dim() > 2 else 0
            arguments = (ArgumentAxes(leaf=leaf, dims=(default,)),)
            tokens = hidden.shape[default]
            call_once = call.detached(fresh=(leaf,))
            whole = observe(subject.forward, call_once)
            lengths = Lengths(whole=tokens, start=0)
            trial = _Trial(default, arguments, lengths, call_once, whole, Slicing(reason=reason))
        if not trial.whole.saved:
            return _without_saves(subject, trial)
        profile = _unsliced(subject, trial, reason) if reason else _sliced(subject, trial)
    return replace(profile, stateful=start.wrote, draws=start.drew)


def calibrate_again(
    block: nn.Module, forward: Forward, call: BlockCall, known: BlockProfile, start: Start
) -> BlockProfile | None:
    """What ``known``'s block saves on ``call``, which differs from its own in the number of sequences.

    Token dimensions are those of ``known``. None: it is not the same there, sliceable where it was not or not where it
    was.

    Raises:
        CROP_ERRORS: whatever the block raises on ``call``.
    """
    subject = _Subject(block, start.every_time(forward), call, known.input_leaf, known.name, known.stack)
    hidden = subject.hidden
    with start.kept(), torch.enable_grad():
        # One that is run again as a whole may have too few tokens for a slice, or be wrong on one.
        unsliced = known.reason if known.dynamic else ""
        trial = _try(subject, known.token_dim, known.arguments, crop_tokens(hidden.device.type), unsliced)
        if not trial.whole.saved:
            return None if known.groups else _without_saves(subject, trial)
        if known.dynamic:
            return _unsliced(subject, trial, known.reason)
        return None if trial.slicing.reason else _sliced(subject, trial)


def crop_tokens(device_type: str) -> int:
    """Most tokens of a crop."""
    return CROP_TOKENS.get(device_type, CROP_TOKENS["cpu"])


def _base(subject: _Subject, trial: _Trial) -> BlockProfile:
    return BlockProfile(
        name=subject.name,
        kind=type(subject.block).__name__,
        stack=subject.stack,
        tokens=subject.hidden.shape[trial.token_dim],
        token_dim=trial.token_dim,
        input_leaf=subject.input_leaf,
        arguments=trial.arguments,
        random=any(pin_kind(record.key[0]) == PinKind.RANDOM for record in trial.whole.operators),
    )


def _last(subject: _Subject, observation: Observation) -> int | None:
    return len(observation.saved) - 1 if stops_early(subject.block) and not observation.walked else None


def _shorter(trial: _Trial) -> tuple[int, ...]:
    """Two lengths below the crop's, for counts that grow with the square of the length."""
    tokens = trial.lengths.whole
    return tuple(sorted({tokens - tokens // 2, tokens - tokens // 4} - {tokens}))


def _whole_flops(subject: _Subject, trial: _Trial) -> tuple[Growth, Growth]:
    """(FLOPs of a forward, FLOPs of a rerun without pins)."""
    seen = [(trial.lengths.whole, trial.whole)]
    for length in _shorter(trial) if trial.lengths.start else ():
        try:
            seen.append((length, observe(subject.forward, subject.crop(trial.arguments, length))))
        except CROP_ERRORS:
            continue
    # A rerun is the forward up to its last save: no run of its own is needed to count it.
    ends = [
        whole.flops if _last(subject, whole) in (None, -1) else whole.flops_to_last_save for _, whole in seen
    ]
    reruns = [(length, count) for (length, _), count in zip(seen, ends, strict=True)]
    return fit_counts([(length, whole.flops) for length, whole in seen]), fit_counts(reruns)


def _without_saves(subject: _Subject, trial: _Trial) -> BlockProfile:
    """A block without a backward, such as a frozen one below all that trains: there is nothing to stash for it."""
    forward_flops, _ = _whole_flops(subject, trial)
    return replace(_base(subject, trial), sliceable=True, replayable=True, forward_flops=forward_flops)


def _sliced(subject: _Subject, trial: _Trial) -> BlockProfile:
    inventory = take_inventory(
        subject.block, trial.call, trial.whole, trial.slicing,
        input_leaf=subject.input_leaf, token_dim=trial.token_dim,
    )  # fmt: skip
    last = _last(subject, trial.whole)
    values = full_values(trial.whole, trial.slicing.pins)
    points = [(trial.lengths.whole, observe(subject.forward, trial.call, values, last=last).flops)]
    for length in _shorter(trial):
        start = trial.lengths.whole - length
        lengths = replace(trial.lengths, start=start)
        tail = trial.call.cut(trial.arguments, start, trial.lengths.whole)
        points.append((length, _tail_flops(subject, trial, tail, lengths, last)))
    forward_flops, recompute_flops = _whole_flops(subject, trial)
    return replace(
        _base(subject, trial),
        saved=tuple(inventory.saved),
        groups=tuple(inventory.groups),
        pins=tuple(inventory.pins),
        sliceable=True,
        replayable=True,
        forward_flops=forward_flops,
        rerun_flops=fit_counts(points),
        recompute_flops=recompute_flops,
    )


def _tail_flops(subject: _Subject, trial: _Trial, tail: BlockCall, lengths: Lengths, last: int | None) -> int:
    values = tail_values(trial.whole, trial.slicing, lengths)
    return observe(subject.forward, tail, values, last=last).flops


def _unsliced(subject: _Subject, trial: _Trial, reason: str) -> BlockProfile:
    """A block that is only ever run again as a whole: what is stored is found by storage at every call."""
    pins = named_pins(trial.whole)
    values = full_values(trial.whole, pins)
    again = observe(subject.forward, trial.call, values, last=_last(subject, trial.whole))
    replayable = not trial.whole.walked and _same_saves(again, trial.whole)
    rerunnable = replayable or _rerunnable(subject, trial)
    if not replayable and not trial.whole.walked:
        reason += "; run again at full length with its mixers replaced, it saves something else"
    if not rerunnable:
        reason += "; nothing of it is run again, since a second run as a whole is not the first"
    forward_flops, recompute_flops = _whole_flops(subject, trial)
    return replace(
        _base(subject, trial),
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


def _rerunnable(subject: _Subject, trial: _Trial) -> bool:
    """Two runs as a whole from the same random state save the same, and leave no gradients behind."""
    start = RandomState.current(subject.hidden.device)
    first = observe(subject.forward, trial.call)
    start.set()
    second = observe(subject.forward, trial.call)
    return _same_saves(first, second) and all(parameter.grad is None for parameter in subject.block.parameters())


def _dynamic_groups(subject: _Subject, trial: _Trial, pins: dict[tuple[str, int], PinKind]) -> list[TensorGroup]:
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
