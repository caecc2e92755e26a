"""One decoder block by the textbook, in a wide dtype and by chunks of tokens, for lengths at which nothing fits whole.

Attention is computed from queries and keys alone, causally, by products of a chunk of queries with a chunk of keys;
gradients of sampled rows follow from the log-sum-exp and the result of *all* queries, which are this file's own. What
goes token by token is the block itself in the wide dtype, on one chunk of tokens at a time, to which attention's result
and gradients are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Tensor = torch.Tensor
_GIVEN = "sampled_rows_given"


def chunks(tokens: int, size: int) -> Iterator[slice]:
    """Of ``size`` each; the last may be shorter."""
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


@dataclass(frozen=True, slots=True)
class Head:
    """One head of queries and the head of keys that it meets, [T, D] each, as the block has them.

    ``grad``: of the head's result.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor

    def first(self, tokens: int) -> Head:
        """Of its first tokens alone."""
        return Head(*(one[:tokens] for one in (self.query, self.key, self.value, self.grad)))


@dataclass(frozen=True, slots=True)
class Reference:
    """Attention of one head in ``dtype``: products of ``queries`` with ``keys`` rows at a time."""

    head: Head
    scale: float
    dtype: torch.dtype
    queries: int = 2048
    keys: int = 4096

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.head.query.shape[0]

    def forward(self) -> tuple[Tensor, Tensor]:
        """(result, log-sum-exp) of all queries; ``4 D T^2 / 2`` FLOPs.

        Scores are taken less that of a query's own key, which is one more column of its product, and weights are summed
        by one more column of values, so that a score is written once and read twice. One that is larger by 88 and more
        makes the result infinite, and so an error.
        """
        head, tokens, depth = self.head, self.tokens, self.head.value.shape[-1]
        output = head.query.new_empty(tokens, depth, dtype=self.dtype)
        lse = head.query.new_empty(tokens, dtype=self.dtype)
        key, value = (self._with_ones(one) for one in (head.key, head.value))
        for rows in chunks(tokens, self.queries):
            query = self._with_ones(head.query[rows]) * self.scale
            own = (query * key[rows])[:, : head.key.shape[1]].sum(1)
            query[:, head.key.shape[1]] = -own
            total = query.new_zeros(len(query), value.shape[1])
            for columns in chunks(rows.stop, self.keys):
                weights = self._masked(query @ key[columns].T, rows.start, columns.start).exp_()
                total.addmm_(weights, value[columns])
            output[rows] = total[:, :depth] / total[:, depth, None]
            lse[rows] = total[:, depth].log() + own
        return output, lse

    def _with_ones(self, rows: Tensor) -> Tensor:
        """With a column of ones behind, and three of zeros, so that rows stay aligned."""
        wide = rows.new_zeros(len(rows), rows.shape[1] + 4, dtype=self.dtype)
        wide[:, : rows.shape[1]] = rows
        wide[:, rows.shape[1]] = 1.0
        return wide

    def _masked(self, scores: Tensor, first_query: int, first_key: int) -> Tensor:
        if first_key + scores.shape[1] <= first_query + 1:
            return scores
        query = torch.arange(first_query, first_query + scores.shape[0], device=scores.device)[:, None]
        key = torch.arange(first_key, first_key + scores.shape[1], device=scores.device)
        return scores.masked_fill_(key > query, float("-inf"))

    def query_gradients(self, rows: Tensor, output: Tensor, lse: Tensor) -> Tensor:
        """Of the queries ``rows``, from the result and log-sum-exp of all."""
        query = self.head.query[rows].to(self.dtype) * self.scale
        grad = self.head.grad[rows].to(self.dtype)
        meets, log_sum, found = (grad * output[rows]).sum(1, keepdim=True), lse[rows, None], torch.zeros_like(query)
        for columns in chunks(self.tokens, self.keys):
            key, value = (one[columns].to(self.dtype) for one in (self.head.key, self.head.value))
            later = torch.arange(columns.start, columns.stop, device=rows.device) > rows[:, None]
            weights = (query @ key.T - log_sum).masked_fill_(later, float("-inf")).exp_()
            found += (weights * (grad @ value.T - meets)) @ key
        return found * self.scale

    def key_gradients(self, rows: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """(of the keys, of the values) ``rows``, by this head of queries: columns of weights over all queries."""
        key, value = (one[rows].to(self.dtype) for one in (self.head.key, self.head.value))
        found_key, found_value = torch.zeros_like(key), torch.zeros_like(value)
        for some in chunks(self.tokens, self.keys):
            query, grad = self.head.query[some].to(self.dtype) * self.scale, self.head.grad[some].to(self.dtype)
            earlier = torch.arange(some.start, some.stop, device=rows.device)[:, None] < rows
            weights = (query @ key.T - lse[some, None]).masked_fill_(earlier, float("-inf")).exp_()
            found_value += weights.T @ grad
            meets = (grad * output[some]).sum(1, keepdim=True)
            found_key += (weights * (grad @ value.T - meets)).T @ query
        return found_key, found_value


def rounded_attention(head: Head, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(result, dq, dk, dv) of a short head, each operand of a product rounded once to the head's dtype, sums wide.

    So a fused kernel does it: scores, weights' sums and products are in float32 at least.
    """
    narrow, wide = head.query.dtype, torch.promote_types(head.query.dtype, torch.float32)
    query, key, value, grad = (one.to(wide) for one in (head.query, head.key, head.value, head.grad))

    def once(tensor: Tensor) -> Tensor:
        return tensor.to(narrow).to(wide)

    scores = query @ key.T * scale
    scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu_(1), float("-inf"))
    weights = scores.softmax(1)
    output = once(once(weights) @ value)
    slopes = once(weights * (grad @ value.T - (grad * output).sum(1, keepdim=True)))
    return output, once(slopes @ key * scale), once(slopes.T @ query * scale), once(once(weights).T @ grad)


# ---- what goes token by token


class _Given(torch.autograd.Function):
    """Attention whose result and gradients are known."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, given: _Chunk, *inputs: Tensor) -> Tensor:
        ctx.given = given  # type: ignore[attr-defined]
        given.inputs = tuple(one.detach() for one in inputs)
        return given.output.to(inputs[0].dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        given: _Chunk = ctx.given  # type: ignore[attr-defined]
        given.grad = grad
        return (None, *(one.to(grad.dtype) for one in given.grads))


class _Chunk:
    """Attention of some tokens: what is given to it, [1, H, T, D], and what it then has met."""

    def __init__(self, output: Tensor, grads: tuple[Tensor, Tensor, Tensor]) -> None:
        self.output, self.grads = output, grads
        self.inputs: tuple[Tensor, ...] = ()
        self.grad: Tensor | None = None


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **_: Any) -> tuple[Tensor, None]:
    mixed: Tensor = _Given.apply(module.sampled_rows, query, key, value)  # type: ignore[no-untyped-call]
    return mixed.transpose(1, 2).contiguous(), None


class TokenWise:
    """A copy of a decoder layer in ``dtype`` that is given what its attention makes.

    ``weights``: gradients of its parameters, summed over all chunks in float64.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        self.layer, self.dtype = deepcopy(layer).to(dtype), dtype
        self.weights: dict[str, Tensor] = {}
        attention: Any = self.layer.self_attn
        attention.config = deepcopy(attention.config)
        attention.config._attn_implementation = _GIVEN
        ALL_ATTENTION_FUNCTIONS.register(_GIVEN, _attend)

    def run(
        self, x: Tensor, grad: Tensor, tables: tuple[Tensor, Tensor], output: Tensor, grads: tuple[Tensor, ...]
    ) -> dict[str, Tensor]:
        """One chunk, [1, t, W] each: what the block makes of it, by name; ``output``, ``grads``: attention's."""
        dq, dk, dv = grads
        chunk = _Chunk(output, (dq, dk, dv))
        attention: Any = self.layer.self_attn
        attention.sampled_rows = chunk
        x = x.detach().to(self.dtype).requires_grad_()
        call: Callable[..., Any] = self.layer
        with torch.enable_grad():
            y = call(x, attention_mask=None, position_embeddings=tuple(one.to(self.dtype) for one in tables))
            y = y[0] if isinstance(y, tuple) else y
            wanted = dict(self.layer.named_parameters())
            dx, *found = torch.autograd.grad(y, [x, *wanted.values()], grad.to(self.dtype))
        for name, one in zip(wanted, found, strict=True):
            self.weights[name] = self.weights.get(name, 0.0) + one.double()
        assert chunk.grad is not None, "the result needs attention"
        names = ("q", "k", "v")
        return {"y": y.detach(), "dx": dx, "do": chunk.grad, **dict(zip(names, chunk.inputs, strict=True))}
