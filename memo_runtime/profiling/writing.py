"""Timing what a rerun on a token slice does with what it saves: it writes it behind the rows that were fetched.

A copy for every tensor that is split into a prefix and a rest, each as large as at the timed length. They go from one
half of a buffer to the other; it is as large as the largest of these tensors and its gradient, both of which the
backward that was timed before had there, beside everything else that it takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from memo_runtime.records import BlockProfile, Role


def written_bytes(profile: BlockProfile, tokens: int) -> list[int]:
    """Bytes of every tensor that a rerun of ``tokens`` tokens writes behind a prefix; views of one are one."""
    groups = {entry.group for entry in profile.saved if entry.axis is not None}
    rows = (profile.groups[number] for number in sorted(groups))
    return [size for group in rows if group.role is Role.TOKEN and group.splits and (size := group.size.at(tokens))]


def writing(sizes: list[int], device: torch.device) -> Callable[[], None]:
    """What copies ``sizes``."""
    half = max(sizes, default=0)
    source, target = torch.zeros(2 * half, dtype=torch.uint8, device=device).split(half) if half else (None, None)

    def copy() -> None:
        assert source is not None and target is not None, "there is something to write"
        for size in sizes:
            target[:size].copy_(source[:size])

    return copy
