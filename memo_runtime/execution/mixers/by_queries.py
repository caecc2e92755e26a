"""Causal attention in chunks of queries, by a fused kernel: each chunk meets all keys before it, and its own causally.

    keys     0 ........ start | start ... stop      o  =  o_before * exp(lse_before - lse) + o_own * exp(lse_own - lse)
    queries  all pairs        | causal              lse = log(exp(lse_before) + exp(lse_own))

The two parts are merged by their log-sum-exps in float32 (in float64 where they are). The log-sum-exp of all keys is
what the kernel's backward wants, so backward is that of the whole. Some kernels lose speed over long causal sequences
and none over rectangles (docs/tiled.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

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
        part, part_lse = chunk_of_queries(attend, query, key, value, (start, stop))
        if lse is None:
            lse = part_lse.new_empty(batch, heads, tokens, *part_lse.shape[3:])
        output[:, :, start:stop] = part
        lse[:, :, start:stop] = part_lse
        del part, part_lse
    assert lse is not None, "there is a chunk"
    return output, lse


def chunk_of_queries(
    attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, where: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, log-sum-exp) of the queries from one place to another, the result in a wider dtype if it is merged."""
    start, stop = where
    rows = query[:, :, start:stop]
    own, own_lse = attend(rows, key[:, :, start:stop], value[:, :, start:stop], True)
    own_lse = own_lse[:, :, : stop - start]  # some kernels fill its last rows up
    if not start:
        return own, own_lse
    before, before_lse = attend(rows, key[:, :, :start], value[:, :, :start], False)
    return _merged(own, own_lse, before, before_lse[:, :, : stop - start])


def chunks(tokens: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each."""
    for start in range(0, tokens, size):
        yield start, min(start + size, tokens)


def _merged(
    own: torch.Tensor, own_lse: torch.Tensor, before: torch.Tensor, before_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and log-sum-exp of both parts together; results are [B, H, S, D], log-sum-exps have one for each row."""
    wide = torch.promote_types(own.dtype, torch.float32)
    share = torch.sigmoid(before_lse.to(wide) - own_lse.to(wide)).reshape(*own.shape[:3], 1)
    return own.to(wide).lerp_(before.to(wide), share), torch.logaddexp(own_lse, before_lse)


def merge_bytes(shape: tuple[int, int, int], size: int, dtype: torch.dtype) -> int:
    """Most bytes that a chunk takes beside the whole result; ``shape``: of that, (sequences, heads, size of a head)."""
    wide = torch.promote_types(dtype, torch.float32)
    sequences, heads, depth = shape
    return sequences * heads * depth * size * 2 * (dtype.itemsize + wide.itemsize)
