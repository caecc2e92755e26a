"""Blocks written by hand, each with one thing that a runtime could get wrong, and a model that stacks them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree

WIDTH = 32
HEADS = 4


class Stack(nn.Module):
    """Embeds by a matrix, calls the blocks one after the other, and yields all that they yielded."""

    def __init__(self, *blocks: nn.Module, embed: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH) if embed else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, **others: Any) -> Any:
        hidden, collected = self.embed(x), []
        for block in self.blocks:
            output = block(hidden, **others)
            hidden, *rest = _pytree.tree_leaves(output)
            collected += rest
        return self.head(hidden), collected


class Part(nn.Module):
    """A block with a norm, a projection to ``parts`` times its width and a gated MLP; subclasses mix."""

    def __init__(self, parts: int = 3) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.project = nn.Linear(WIDTH, parts * WIDTH)
        self.merge = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Parts of the projection as [B, heads, S, D]."""
        parts = self.project(self.norm(x)).chunk(self.project.out_features // WIDTH, dim=-1)
        return tuple(part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Residuals and the MLP."""
        x = x + self.merge(mixed)
        return x + self.down(functional.silu(self.up(x)))


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Attention(Part):
    """Causal attention."""

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return merge_heads(functional.scaled_dot_product_attention(q, k, v, is_causal=True))

    def forward(self, x: Tensor) -> Any:
        return self.finish(x, self.mix(x))


class TwoMixers(Part):
    """Causal attention, then attention to everything with the result as queries."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        first = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        second = functional.scaled_dot_product_attention(first, k, v)
        return self.finish(x, merge_heads(second))


class NoMixer(Part):
    """Token by token."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.project(self.norm(x)).chunk(3, dim=-1)
        return self.finish(x, torch.sigmoid(a) * b + c)


class EagerAttention(Part):
    """Matmul, mask, softmax, dropout, matmul."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
        weights = functional.dropout(weights, 0.1, self.training)
        return self.finish(x, merge_heads(weights @ v))


class BufferedMask(Part):
    """Cuts its causal mask out of a buffer, as nanoGPT does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("past", torch.ones(48, 48, dtype=torch.bool).tril().view(1, 1, 48, 48))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~self.past[:, :, : x.shape[1], : x.shape[1]], float("-inf"))
        return self.finish(x, merge_heads(scores.softmax(-1) @ v))


class Spectrum(Part):
    """A Fourier transform over tokens: complex numbers."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.project(self.norm(x)).chunk(3, dim=-1)
        return self.finish(x, torch.fft.fft(a.to(torch.complex128), dim=1).real * 0.1 * b + c)


class OnlyMultiples(Attention):
    """Asserts that the length is a multiple of 8."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] % 8 == 0, "a multiple of 8"
        return super().forward(x)


class CutConvolution(Part):
    """Saves the convolution's result without its last tokens: a tensor with gaps in memory."""

    def __init__(self) -> None:
        super().__init__(4)
        self.conv = nn.Conv1d(2 * WIDTH, 2 * WIDTH, 4, groups=2 * WIDTH, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.project(self.norm(x)).chunk(2, dim=-1)
        mixed = functional.silu(self.conv(a.transpose(1, 2))[..., : x.shape[1]])
        pairs = mixed.unflatten(1, (2, WIDTH)).prod(1)
        return self.finish(x, pairs.transpose(1, 2) + b[..., :WIDTH])


class Convolution(Part):
    """A depthwise causal convolution over time."""

    def __init__(self) -> None:
        super().__init__(2)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        a, gate = self.project(self.norm(x)).chunk(2, dim=-1)
        mixed = self.conv(a.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return self.finish(x, functional.silu(mixed) * gate)


class CumulativeSum(Part):
    """The mean of what came before."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.project(self.norm(x)).chunk(3, dim=-1)
        return self.finish(x, torch.tanh(a.cumsum(1) * 0.1) * b + c)


class Squeeze(Part):
    """A gate from the mean over all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.project(self.norm(x)).chunk(3, dim=-1)
        return self.finish(x, torch.sigmoid(a.mean(1, keepdim=True)) * b + c)


class OwnPositions(Part):
    """Computes rotary angles itself."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        rates = 100.0 ** (-torch.arange(0, q.shape[-1], 2, dtype=x.dtype) / q.shape[-1])
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * rates
        q, k = (self._rotate(part, angles) for part in (q, k))
        return self.finish(x, merge_heads(functional.scaled_dot_product_attention(q, k, v, is_causal=True)))

    @staticmethod
    def _rotate(x: Tensor, angles: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), dim=-1)


class TupleOutput(Attention):
    """Yields what it mixed as well, and nothing in between."""

    def forward(self, x: Tensor) -> Any:
        mixed = self.mix(x)
        return self.finish(x, mixed), None, (mixed, mixed.mean())


class DictOutput(Attention):
    """Yields names."""

    def forward(self, x: Tensor) -> Any:
        mixed = self.mix(x)
        return {"hidden": self.finish(x, mixed), "mixed": mixed}


class InPlace(Attention):
    """Operators that write to their argument."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.merge(self.mix(x)).relu_()
        return functional.dropout(self.down(functional.elu_(self.up(x))), 0.1, self.training, inplace=True).add_(x)


class Routed(Part):
    """Picks tokens by their data: what it saves has no fixed size."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.project(self.norm(x)).chunk(3, dim=-1)
        chosen = a.mean(-1) > 0
        mixed = b.clone()
        mixed[chosen] = self.merge(c[chosen])
        return self.finish(x, mixed)


class Sequential2d(Attention):
    """Tokens of one packed sequence as [T, H]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[None])[0]


class TimeFirst(Attention):
    """[S, B, H]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class Doubling(torch.autograd.Function):
    """Saves its input and its output, and a number on the context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        y = torch.sinh(x) * factor
        ctx.save_for_backward(x, y)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return grad * torch.cosh(x) * ctx.factor + 0 * y, None


class CustomFunction(Attention):
    """An autograd function in the middle."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x, Doubling.apply(self.mix(x), 0.5))


class Normalised(Attention):
    """A weight made from parameters at every call."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.up)


class Twice(Attention):
    """One projection used twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x, self.merge(self.mix(x)))


class SharedValues(Part):
    """Mixes its values with those of the first block, which carry gradients."""

    def forward(self, x: Tensor, first: Tensor | None) -> Any:
        q, k, v = self.heads(x)
        first = v if first is None else first
        mixed = functional.scaled_dot_product_attention(q, k, 0.5 * (v + first), is_causal=True)
        return self.finish(x, merge_heads(mixed)), first


class SharedStack(Stack):
    """Hands the values of the first block to all others."""

    def forward(self, x: Tensor) -> Any:
        hidden, first = self.embed(x), None
        for block in self.blocks:
            hidden, first = block(hidden, first)
        return self.head(hidden), first


class Backbone(nn.Module):
    """A bias of [1, heads, S, S] with gradients that all blocks add to their scores."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.rand(HEADS))
        self.blocks = nn.ModuleList(Biased() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], dtype=x.dtype)
        bias = self.slopes[None, :, None, None] * (steps[None, :] - steps[:, None]).abs()
        for block in self.blocks:
            x = block(x, bias=-bias)
        return x


class Biased(Part):
    """Attention with a bias."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.finish(x, merge_heads(functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


def stack_of(kind: type[nn.Module], *, count: int = 2) -> nn.Module:
    """A double-precision model in training mode, the same at every call."""
    torch.manual_seed(0)
    return Stack(*(kind() for _ in range(count))).double().train()


def sequence(*, rows: int = 2, tokens: int = 21, grad: bool = False) -> Tensor:
    """[rows, tokens, WIDTH]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, tokens, WIDTH, generator=generator, dtype=torch.float64).requires_grad_(grad)
