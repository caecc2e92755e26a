"""Attention in chunks of queries, with autograd inside each chunk.

For what no fused kernel takes: dropout where the kernel has none, biases that need a gradient, odd head sizes. Scores
of one chunk exist at a time; backward makes them again. It is slower than a fused kernel, and the report names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from memo_runtime.execution.tiled_random import bernoulli, mixed_seed

#: Scores of one chunk have at most this many elements.
MAX_SCORES = 1 << 26


@dataclass(frozen=True, slots=True)
class RowsAttention:
    """One attention call; queries and keys have the same length and positions.

    Args:
        scale: factor of the scores.
        causal: a query sees keys up to its own position.
        dropout: probability that a weight is dropped.
        seed: of the dropout.
    """

    scale: float
    causal: bool
    dropout: float
    seed: int

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The output, [B, H, S, D] over memory laid out [B, S, H, D]."""
        batch, heads, tokens, _ = query.shape
        output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        for start, stop in self._chunks(query):
            output[:, :, start:stop] = self._chunk(query[:, :, start:stop], key, value, mask, start)
        return output

    def whole(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The output with autograd's graph, for comparison."""
        parts = [self._chunk(query[:, :, a:b], key, value, mask, a) for a, b in self._chunks(query)]
        return torch.cat(parts, dim=2)

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key, value and of a mask that is no boolean one."""
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        query_grad = torch.empty_like(query)
        key_grad, value_grad = (torch.zeros_like(part, dtype=wide) for part in (key, value))
        biased = mask is not None and mask.is_floating_point()
        mask_grad = torch.zeros_like(mask, dtype=wide) if mask is not None and biased else None
        key, value = (part.detach().requires_grad_() for part in (key, value))
        if mask is not None and biased:
            mask = mask.detach().requires_grad_()
        for start, stop in self._chunks(query):
            with torch.enable_grad():
                rows = query[:, :, start:stop].detach().requires_grad_()
                output = self._chunk(rows, key, value, mask, start)
            wanted = [rows, key, value, *([mask] if mask is not None and mask_grad is not None else [])]
            grads = torch.autograd.grad(output, wanted, grad[:, :, start:stop])
            query_grad[:, :, start:stop] = grads[0]
            key_grad += grads[1]
            value_grad += grads[2]
            if mask_grad is not None:
                mask_grad += grads[3]
        found = mask_grad.to(mask.dtype) if mask_grad is not None and mask is not None else None
        return query_grad, key_grad.to(key.dtype), value_grad.to(value.dtype), found

    def _chunks(self, query: torch.Tensor) -> Iterator[tuple[int, int]]:
        batch, heads, tokens, _ = query.shape
        size = max(1, min(tokens, MAX_SCORES // (batch * heads * tokens)))
        for start in range(0, tokens, size):
            yield start, min(start + size, tokens)

    def _chunk(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, start: int
    ) -> torch.Tensor:
        """Rows of the output, for queries from ``start`` on."""
        groups = query.shape[1] // key.shape[1]
        stop = start + query.shape[2]
        if self.causal:
            key, value = key[:, :, :stop], value[:, :, :stop]
        if groups > 1:
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = (query.to(wide) * self.scale) @ key.to(wide).transpose(-1, -2)
        if self.causal:
            places = torch.arange(start, stop, device=query.device)[:, None]
            scores = scores.masked_fill(torch.arange(stop, device=query.device) > places, float("-inf"))
        scores = _masked(scores, mask, start, stop)
        # A row that sees nothing yields zeros, as the fused kernels do, and no gradient.
        blind = (scores == float("-inf")).all(-1, keepdim=True)
        weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
        if self.dropout > 0.0:
            keep = bernoulli(weights.shape, 1.0 - self.dropout, mixed_seed(self.seed, start), weights.device)
            weights = weights * keep * (0.0 if self.dropout == 1.0 else 1.0 / (1.0 - self.dropout))
        return (weights @ value.to(wide)).to(query.dtype)


def _masked(scores: torch.Tensor, mask: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
    if mask is None:
        return scores
    if mask.dim() >= 2 and mask.shape[-2] != 1:
        mask = mask[..., start:stop, :]
    if mask.shape[-1] != 1:
        mask = mask[..., : scores.shape[-1]]
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
