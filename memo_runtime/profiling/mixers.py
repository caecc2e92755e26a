"""Timing attention at the length that it will have, where its block is timed at shorter ones only.

The time of a block without its attention grows in proportion to the tokens. That of attention grows with their square,
at a rate that rises until the device is full and falls again at lengths that no short run shows. Its inputs are small,
though: queries, keys and values of one group of heads take little memory and a fraction of the time at any length.

    block at 8K, 16K, 32K  -  attention at 8K, 16K, 32K  =  the rest, on a line
    attention at 128K: one group of heads, times the groups

It is timed in rounds with as much of its block as a step has beside it (``blocks/stopwatch.py`` says why).

Attention under spans (windows, documents) is timed in the same way, under the spans of the call itself. What it takes
is about a line in the tokens: so is the sum of its pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from memo_runtime.blocks.operators import MASKED_ATTENTION, base_name
from memo_runtime.blocks.ranks import several_ranks
from memo_runtime.blocks.stopwatch import Beside, typical
from memo_runtime.profiling.observe import OperatorRecord

#: Operators that take queries, keys and values as [rows, heads, tokens, features] in front of everything else.
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)
#: Query rows (heads times tokens) that keep a device busy: fewer groups of heads are not timed.
_BUSY_ROWS = {"cuda": 2**18, "cpu": 2**8}


@dataclass(frozen=True, slots=True)
class Attention:
    """Seconds of attention; ``by_token``: at other lengths in proportion to the tokens, not to their square."""

    forward: float
    backward: float
    by_token: bool = False


def is_attention(record: OperatorRecord) -> bool:
    """Whether ``record`` can be run at other lengths: no mask or bias, which are as large as all scores."""
    if base_name(record.key[0]) not in _ATTENTION or len(record.args) < 3 or len(record.inputs) != 3:
        return False
    q, k, v = record.args[:3]
    tensors = all(isinstance(tensor, torch.Tensor) and tensor.dim() == 4 for tensor in (q, k, v))
    return tensors and q.shape[2] == k.shape[2] == v.shape[2] and q.shape[1] % k.shape[1] == 0


def is_under_spans(record: OperatorRecord) -> bool:
    """Whether ``record`` is attention whose mask is said in spans."""
    return record.key[0].rsplit(".", 1)[0] == MASKED_ATTENTION and len(record.args) == 5


def time_under_spans(
    records: Sequence[OperatorRecord],
    lengths: Sequence[int],
    spans_at: Callable[[int], torch.Tensor],
    beside: Beside | None = None,
) -> Mapping[int, Attention]:
    """As ``time_attention``; ``spans_at``: the spans of so many tokens."""
    found = {}
    for tokens in lengths:
        spans = spans_at(tokens)
        asked = [replace(record, args=(*record.args[:3], spans, *record.args[4:])) for record in records]
        each = [_time(record, tokens, beside, rows=record.args[0].shape[0]) for record in asked]
        found[tokens] = Attention(sum(one.forward for one in each), sum(one.backward for one in each), by_token=True)
    return found


def time_attention(
    records: Sequence[OperatorRecord], lengths: Sequence[int], beside: Beside | None = None
) -> Mapping[int, Attention]:
    """Seconds of all ``records`` together, forward and backward, at each of ``lengths``."""
    found = {}
    for tokens in lengths:
        each = [_time(record, tokens, beside) for record in records]
        found[tokens] = Attention(sum(one.forward for one in each), sum(one.backward for one in each))
    return found


def _time(record: OperatorRecord, tokens: int, beside: Beside | None, rows: int = 1) -> Attention:
    """By so many ``rows``, which stand for all."""
    q, k, _ = record.args[:3]
    device, groups, per_group = q.device, k.shape[1], q.shape[1] // k.shape[1]
    busy = _BUSY_ROWS.get(device.type, _BUSY_ROWS["cpu"])
    timed = min(groups, -(-busy // (rows * tokens * per_group)))
    tensors = [_stretched(tensor, tokens, timed * tensor.shape[1] // groups, rows) for tensor in record.args[:3]]
    outputs: list[torch.Tensor] = []

    def forward() -> None:
        outputs.append(_result(record, tensors))

    def backward() -> None:
        output = outputs.pop()
        torch.autograd.grad(output, tensors, output.detach())

    times = q.shape[0] / rows * groups / timed
    rest = beside.runs(tokens / times) if beside is not None else []
    with torch.enable_grad():
        seconds = typical([*rest, forward, backward], device, (-2, -1), together=several_ranks())
    return Attention(seconds[0] * times, seconds[1] * times)


def _result(record: OperatorRecord, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    out = record.func(*tensors, *record.args[3:], **record.kwargs)
    result = out[0] if isinstance(out, (tuple, list)) else out
    assert isinstance(result, torch.Tensor), "attention yields a tensor first"
    return result


def _stretched(tensor: torch.Tensor, tokens: int, heads: int, rows: int = 1) -> torch.Tensor:
    """One row and ``heads`` heads of ``tensor``, ``rows`` times, its tokens repeated, in the usual order of memory."""
    by_token = tensor.detach()[0, :heads].transpose(0, 1)
    repeats = -(-tokens // by_token.shape[0])
    made = by_token.repeat(repeats, 1, 1)[:tokens].repeat(rows, 1, 1, 1)
    return made.transpose(1, 2).requires_grad_()
