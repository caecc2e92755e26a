"""Blocks with one thing each that a capture must see, beside those of tests/exactness/hand_written.py."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.exactness.hand_written import HEADS, WIDTH, Attention, Part, merge_heads


class Round(torch.autograd.Function):
    """A straight-through estimator: forward rounds, backward does not know."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class StraightThrough(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x, Round.apply(self.mix(x)))


class TensorHook(Attention):
    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(x)
        mixed.register_hook(lambda grad: 2 * grad)
        return self.finish(x, mixed)


class LearnedPositions(Attention):
    """Makes a value with tokens of a parameter, and yields the number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(64, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, int, None]:
        tokens = x.shape[1]
        return super().forward(x + self.positions(tokens - 1 - torch.arange(tokens))), tokens, None


LOSSES: list[Tensor] = []


class AppendsALoss(Attention):
    """Leaves something where the training loop looks for it."""

    def forward(self, x: Tensor) -> Tensor:
        LOSSES.append(x.square().mean())
        return super().forward(x)


class DropsByPython(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if random.random() < 0.5 else x


class WritesInput(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2.0))


class WritesView(Attention):
    """Writes to a value of which a view is used afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        y = 2 * x
        view = y.transpose(1, 2)
        y.add_(1.0)
        return super().forward(view.transpose(1, 2))


class Counts(Attention):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class CountsInPython(Attention):
    """Counts its calls in an attribute."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x / self.calls)


class StoresALoss(Attention):
    """Leaves an auxiliary loss for whoever looks for it."""

    def forward(self, x: Tensor) -> Tensor:
        self.merge.loss = x.square().mean(-1)
        return super().forward(x)


class Tables(Attention):
    """Takes apart by operators with several results what needs no gradient: a buffer, and its input without one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tables", torch.rand(2 * WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.tables.chunk(2)
        low, _ = x.detach().chunk(2, dim=-1)
        return super().forward(x * scale + shift / (1.0 + low.abs().max()))


class BufferedScale(Attention):
    """Has a buffer that whoever calls it computes, with a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


class AttributeScale(Attention):
    """Has a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


class ByLength(Attention):
    """The number of tokens is a number in a formula."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / x.shape[1])


class OneLength(Attention):
    """Takes another way for the number of tokens that it is traced with."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x if x.shape[1] == 29 else x)


class Frequencies(Attention):
    """Its embedding's gradient counts how often a number occurs in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, WIDTH, scale_grad_by_freq=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.table((x[..., 0] > 0).long()))


class Repeated(Attention):
    """Repeats every element, over all dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.repeat_interleave(2).view(*x.shape[:2], -1)[..., ::2])


class WithoutGradient(Attention):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().amax(-1, keepdim=True)
        return super().forward(x / scale)


class Detached(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / x.detach().abs().amax(-1, keepdim=True))


class Noise(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


class NormOverTokens(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.instance_norm(x))


class MixesItself(nn.Module):
    """Attention by products whose queries, keys and values are one tensor."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return x + torch.softmax(x @ x.transpose(1, 2), -1) @ x


class Shifted(Attention):
    """Every token sees the one before."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat((x[:, :1], x[:, :-1]), dim=1))


class AnotherWay(Part):
    """Takes another way for long sequences."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if x.shape[1] < 24:
            q = q * 2
        return self.finish(x, merge_heads(functional.scaled_dot_product_attention(q, k, v, is_causal=True)))


class Switched(Attention):
    """Has Python state that changes what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = {"scales": [1.0]}

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        x = x if extra is None else x + extra
        return super().forward(x * self.settings["scales"][0])


class DocumentMask(Part):
    """Makes a mask out of document numbers: a comparison of every token with every other."""

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        same = documents[:, None, :, None] == documents[:, None, None, :]
        mask = same & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return self.finish(x, merge_heads(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


class LearnedBias(Part):
    """A bias of its scores that is made from a parameter, and yielded."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(8, HEADS)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.heads(x)
        places = torch.arange(x.shape[1])
        bias = self.bias((places[:, None] - places[None, :]).clamp(-3, 4) + 3).permute(2, 0, 1)[None]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.finish(x, merge_heads(mixed)), bias


class MaskByTiles(Part):
    """Uses a mask of all pairs beside attention too: its diagonal scales tokens."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.finish(x * mask.diagonal(dim1=-2, dim2=-1).mean(1)[..., None], merge_heads(mixed))


class Sinks(Part):
    """Attention by products: scores scaled by each query, with a learned one more, less the largest of each."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.scale = nn.Linear(WIDTH, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) * self.scale(x).transpose(1, 2).unsqueeze(-1)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[1], -1)
        scores = torch.cat((scores, sinks), dim=-1)
        scores = scores - scores.max(dim=-1, keepdim=True).values
        return self.finish(x, merge_heads(torch.softmax(scores, -1)[..., :-1] @ v))


class MaskOfRows(Part):
    """A mask for each row of the batch, or for all of them, without a dimension of heads."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        mask = mask if mask.dim() == 2 else mask[:, None]
        return self.finish(x, merge_heads(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


class MaskTimesTokens(Part):
    """Lets every token see its row of the mask outside of attention."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.finish(x, merge_heads(mixed)) * (x[..., :1] * mask[:, 0].to(x.dtype)).amax(-1, keepdim=True)


class MaskFromTokens(Part):
    """Makes a bias of its scores out of its hidden states."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        bias = (x @ x.transpose(1, 2))[:, None]
        return self.finish(x, merge_heads(functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


class Cross(Part):
    """Attention to other tokens than its own."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        q, _, _ = self.heads(x)
        k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.keys(others).chunk(2, dim=-1))
        return self.finish(x, merge_heads(functional.scaled_dot_product_attention(q, k, v)))


class PassThrough(Attention):
    """Yields its input, and one tensor twice."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, x, y


class GivesBack(Attention):
    """Yields its input and nothing that it makes."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return x
