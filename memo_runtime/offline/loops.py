"""Loops over tokens in Python: a block whose operators grow with its tokens.

A scan that a library has kernels for is such a loop where they are not installed, and always without a GPU. One
operator and more for each token makes minutes of every length that is looked at, and a step that only launches takes:
nothing of such a plan would be true. A loop over chunks of tokens is planned, and what it launches is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memo_runtime.blocks.call import BlockCall
from memo_runtime.errors import ProfileError
from memo_runtime.offline.measure import BlockRun, stretched
from memo_runtime.recording.meta_attention import fused_attention_on_meta
from memo_runtime.recording.meta_scalars import PlainAnswers
from memo_runtime.records import BlockProfile

#: Tokens of the two forwards that are compared; a chunk of 256 is one in both.
_SHORT, _LONG = 64, 256
#: Operators for each token from which on tokens are gone through one by one.
_ONE_BY_ONE = 1.0
#: Of which a message says what a step would launch.
_EXAMPLE = 131072


class _Count(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``."""
        self.operators += 1
        return func(*args, **(kwargs or {}))


def check_no_loop(block: nn.Module, call: BlockCall, profile: BlockProfile) -> None:
    """Refuse ``block`` (on meta) if it goes through its tokens one by one.

    Raises:
        ProfileError: it does.
    """
    short, long = (_operators(block, stretched(call, profile, tokens)) for tokens in (_SHORT, _LONG))
    each = (long - short) / (_LONG - _SHORT)
    if each < _ONE_BY_ONE:
        return
    raise ProfileError(
        f"{profile.name} ({type(block).__name__}) goes through its tokens one by one in Python: its forward runs "
        f"{short:,} operators for {_SHORT} tokens and {long:,} for {_LONG}, so {round(each * _EXAMPLE):,} for "
        f"{_EXAMPLE:,}, and launching them would be most of a step, which no plan made here knows. Where a library has "
        "a kernel for such a scan (for Mamba and Jamba of transformers: mamba-ssm and causal-conv1d), the loop is what "
        "runs without it, and the kernel needs a GPU. What works: on the GPU, with the kernel installed, memo.wrap and "
        "memo profile measure the model as it runs there; here, models with attention, or that scan by chunks of "
        "tokens (Mamba2, Bamba)"
    )


def _operators(block: nn.Module, call: BlockCall) -> int:
    args, kwargs = call.arguments()
    count = _Count()
    with fused_attention_on_meta(), PlainAnswers(), torch.enable_grad(), count:
        block.forward(*args, **kwargs)
    return count.operators


def note_on_launches(runs: Sequence[Sequence[BlockRun]], tokens: int) -> Iterator[str]:
    """What has to be said of blocks with such ``runs``, one sequence of them for each block, at ``tokens`` tokens."""
    found = [_each(of_block) for of_block in runs]
    growing = [each for each in found if each > 0]
    if growing:
        yield (
            f"{len(growing)} of {len(found)} blocks loop over chunks of tokens in Python: some "
            f"{round(sum(growing) * tokens):,} operators in a forward and backward of {tokens:,} tokens, whose "
            "launches are in no forecast: where they take longer than the work, so does the step"
        )


def _each(runs: Sequence[BlockRun]) -> float:
    """Operators of forward and backward for each token, beyond those that any number of tokens takes."""
    if len(runs) < 2:
        return 0.0
    before, last = runs[-2], runs[-1]
    more = (last.forward.operators + last.backward.operators) - (before.forward.operators + before.backward.operators)
    return more / (last.tokens - before.tokens)
