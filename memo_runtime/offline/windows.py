"""Sliding windows: how many keys each query of a block sees, and what that leaves of causal attention's work.

Blocks are looked at as they are called with few tokens, where a window is as long as the sequence and attention is
causal; a wrapped model computes no more than the window at any length (docs/masks.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from memo_runtime.offline.measure import BlockRun
from memo_runtime.offline.work import Work


def window_of(block: nn.Module) -> int | None:
    """Keys that each query of ``block`` sees at most; None: all before it.

    Attention of Hugging Face has it as an attribute, None where the layer has none, or hands on that of its config.
    """
    modules = list(block.modules())
    found: list[object] = [module.sliding_window for module in modules if hasattr(module, "sliding_window")]
    if not found:
        configs = [getattr(module, "config", None) for module in modules if hasattr(module, "is_causal")]
        found = [getattr(config, "sliding_window", None) for config in configs]
    return next((one for one in found if isinstance(one, int) and one > 0), None)


def within_window(runs: Sequence[BlockRun], window: int | None, tokens: int) -> tuple[BlockRun, ...]:
    """``runs`` with the attention of a sequence of ``tokens``, which grows with them beyond ``window``."""
    if window is None or tokens <= window:
        return tuple(runs)
    # Of n^2 / 2 pairs of a causal square, n w - w^2 / 2 are in the window.
    pairs = 2 * window - window**2 / tokens

    def cut(work: Work, length: int) -> Work:
        return replace(work, attention=round(work.attention * pairs / length))

    return tuple(
        replace(
            run, forward=cut(run.forward, run.tokens), backward=cut(run.backward, run.tokens),
            rerun=cut(run.rerun, run.tokens),
        )
        for run in runs
    )  # fmt: skip


def note_on_windows(windows: Sequence[int | None], tokens: int) -> Iterator[str]:
    """What has to be said of blocks with such ``windows``."""
    shorter = [window for window in windows if window is not None and window < tokens]
    if shorter:
        sizes = " and ".join(f"{size:,}" for size in sorted(set(shorter)))
        yield (
            f"{len(shorter)} of {len(windows)} blocks attend to a window of {sizes} tokens: its work is counted at the "
            "rate of attention to all tokens, which kernels for windows may not reach"
        )
