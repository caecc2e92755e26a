"""Causal attention in chunks of queries, by a fused kernel: each chunk meets all keys before it, and its own causally.

    keys     0 ........ start | start ... stop
    queries  all pairs        | causal              both parts are merged (``merging.py``)

The log-sum-exp of all keys is what the kernel's backward wants, so backward is that of the whole. Some kernels lose
speed over long causal sequences and none over rectangles (docs/tiled.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from memo_runtime.execution.mixers.merging import Part, merge_into

#: What a kernel makes of (queries, keys, values, causal): its result and its log-sum-exp.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor]]


def forward_by_queries(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, log-sum-exp) of causal attention in chunks of ``size`` queries."""
    batch, heads, tokens, _ = query.shape
    output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    lse: torch.Tensor | None = None
    for start, stop in chunks(tokens, size):
        own = own_part(attend, query, key, value, (start, stop))
        if lse is None:
            lse = own.lse.new_empty(batch, heads, tokens, *own.lse.shape[3:])
        place = Part(output[:, :, start:stop], lse[:, :, start:stop])
        if start:
            merge_into(place, own, part_before(attend, query, key, value, (start, stop)))
        else:
            place.output.copy_(own.output)
            place.lse.copy_(own.lse)
        del own
    assert lse is not None, "there is a chunk"
    return output, lse


def own_part(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, where: tuple[int, int]
) -> Part:
    """Of the queries from one place to another, over keys from there on."""
    start, stop = where
    output, lse = attend(query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop], True)
    return Part(output, lse[:, :, : stop - start])  # some kernels fill its last rows up


def part_before(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, where: tuple[int, int]
) -> Part:
    """Of the same queries, over all keys before them."""
    start, stop = where
    output, lse = attend(query[:, :, start:stop], key[:, :, :start], value[:, :, :start], False)
    return Part(output, lse[:, :, : stop - start])


def chunks(tokens: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each."""
    for start in range(0, tokens, size):
        yield start, min(start + size, tokens)
