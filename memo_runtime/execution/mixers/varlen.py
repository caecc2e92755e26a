"""Documents and windows in one call of flash attention's varlen kernel.

The kernel takes all rows one after another, [B * S, H, D], and where each document begins. Queries that see nothing are
documents of their own there, whose results and gradients are set to zero.

It takes windows, and is the only one that does. Long documents without a window are left to the kernels of plain
attention, one call each: cuDNN's are half again as fast on an H100.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memo_runtime.blocks.spans import Documents, Layout
from memo_runtime.execution.mixers.attention import Inputs, Settings, kernels_for

aten: Any = torch.ops.aten
#: Documents of this many tokens keep a GPU busy one at a time.
_LONG = 4096


@dataclass(frozen=True, slots=True)
class Varlen:
    """One call: where each document begins, and the whole ends, on the device and here."""

    documents: Documents
    begins: torch.Tensor
    blind: tuple[tuple[int, int], ...]

    @property
    def settings(self) -> dict[str, int]:
        """The window, as the kernel counts it: keys before the query's own."""
        window = self.documents.window
        return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def varlen_of(layout: Layout, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Varlen | None:
    """How the kernel computes ``layout``; None: it cannot, or others are faster."""
    documents = layout.documents
    if documents is None or not documents.bounds or query.device.type != "cuda":
        return None
    if documents.window is None and documents.shortest >= _LONG:
        return None
    settings = Settings(dropout=0.0, causal=True, scale=1.0, grouped=True)
    tokens = query.shape[2]
    if key.shape[2] != tokens or "flash" not in kernels_for(Inputs(query, key, value, None), settings):
        return None
    begins, blind = [0], []
    for start, stop in _flat(documents, tokens):
        if start > begins[-1]:
            blind.append((begins[-1], start))
            begins.append(start)
        begins.append(stop)
    whole = len(query) * tokens
    if begins[-1] < whole:
        blind.append((begins[-1], whole))
        begins.append(whole)
    return Varlen(documents, torch.tensor(begins, dtype=torch.int32, device=query.device), tuple(blind))


def _flat(documents: Documents, tokens: int) -> Iterator[tuple[int, int]]:
    for row, start, stop in documents.bounds:
        yield row * tokens + start, row * tokens + stop


def _longest(varlen: Varlen) -> int:
    return max(varlen.documents.longest, *(stop - start for start, stop in varlen.blind), 1)


def _in_a_row(tensor: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] as [B * S, H, D]; no copy where memory is token-major."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _in_rows(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """[B * S, H, D] as [B, H, S, D]."""
    found: torch.Tensor = tensor.unflatten(0, (batch, -1)).transpose(1, 2)
    return found


def varlen_forward(
    varlen: Varlen, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [B, H, S, D], log-sum-exp [B, H, S])."""
    longest = _longest(varlen)
    output, lse, *_ = aten._flash_attention_forward(
        _in_a_row(query), _in_a_row(key), _in_a_row(value), varlen.begins, varlen.begins, longest, longest, 0.0, True,
        False, scale=scale, **varlen.settings,
    )  # fmt: skip
    for start, stop in varlen.blind:
        output[start:stop] = 0
    return _in_rows(output, len(query)), lse.unflatten(1, (len(query), -1)).transpose(0, 1).contiguous()


def varlen_backward(
    varlen: Varlen, grad: torch.Tensor, tensors: Sequence[torch.Tensor], lse: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values, which ``tensors`` are, and the output."""
    longest, device, batch = _longest(varlen), lse.device, len(lse)
    state, unused = (torch.zeros(size, dtype=torch.uint64, device=device) for size in (2, ()))
    found = aten._flash_attention_backward(
        _in_a_row(grad), *map(_in_a_row, tensors), lse.transpose(0, 1).flatten(1), varlen.begins, varlen.begins,
        longest, longest, 0.0, True, state, unused, scale=scale, **varlen.settings,
    )  # fmt: skip
    for one in found:
        for start, stop in varlen.blind:
            one[start:stop] = 0
    query_grad, key_grad, value_grad = (_in_rows(one, batch) for one in found)
    return query_grad, key_grad, value_grad
