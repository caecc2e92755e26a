"""What the front door is tried on: a tiny hand-written model, a tiny Llama, and one step of either."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.records import Report, Totals
from tests.integrations.models import batch, make

HIDDEN = 32
#: Everything that wrap may be asked for, with no block left alone.
POLICIES: dict[str, dict[str, Any]] = {
    "swap": {"policy": "swap", "keep_last": 0},
    "recompute": {"policy": "recompute", "keep_last": 0},
    "memo": {"policy": "memo", "alpha": 0.37, "keep_last": 0},
}
BOUND = 1e-12

Gradients = dict[str, Tensor]


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 48), nn.SiLU(), nn.Linear(48, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        q, k, v = (
            part.view(rows, tokens, 4, HIDDEN // 4).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, tokens, HIDDEN))
        return x + self.mlp(x)


class Tower(nn.Module):
    """A stack of blocks between two linear layers."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(8, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.last = nn.Linear(HIDDEN, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def tower(blocks: int = 3, *, dtype: torch.dtype = torch.float64) -> Tower:
    """The same weights at every call."""
    torch.manual_seed(0)
    return Tower(blocks).to(dtype)


def signal(tokens: int = 24, rows: int = 2, *, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """A batch for a tower."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, 8, generator=generator, dtype=torch.float64).to(dtype)


def llama(**how: Any) -> Any:
    """A Llama as it comes."""
    return make("llama", **how)


def wrapped_llama(**settings: Any) -> Any:
    """A Llama as it comes, wrapped: its head and loss run by tiles."""
    return memo.wrap(make("llama"), **(settings or POLICIES["memo"]))


def loss_of(model: nn.Module, inputs: Any = None) -> Tensor:
    """Loss of a tower (mean square) or of a Hugging Face model (its own)."""
    if isinstance(inputs, Tensor):
        output = model(inputs)
        return (output.double() if output.dtype is torch.float64 else output.float()).square().mean()
    loss: Tensor = model(**(batch(tokens=24) if inputs is None else inputs)).loss
    return loss


def step(model: nn.Module, inputs: Any = None) -> Gradients:
    """Forward and backward; the gradients by name, taken away from the model."""
    model.zero_grad(set_to_none=True)
    loss_of(model, inputs).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(got: Gradients, want: Gradients, bound: float = BOUND) -> None:
    """Every gradient is there, and all together are within ``bound`` relative L2 error."""
    assert list(got) == list(want)
    for name, value in want.items():
        gap = torch.linalg.vector_norm((got[name] - value).double())
        assert gap <= bound * torch.linalg.vector_norm(value.double()), name


def assert_trains_as(model: nn.Module, plain: nn.Module, inputs: Any = None, *, bound: float = BOUND) -> None:
    """Both models have the same gradients, whatever is around ``model``'s parameter names."""
    got, want = step(model, inputs), step(plain, inputs)
    assert len(got) == len(want)
    assert_close(dict(zip(want, got.values(), strict=True)), want, bound)


def totals(model: nn.Module) -> Totals:
    return memo.report(model).totals


def acted(model: nn.Module) -> Report:
    """The report, after seeing that the last step moved bytes by the plan."""
    report = memo.report(model)
    assert report.totals.bytes_to_host == report.totals.forecast.bytes_to_host > 0
    assert report.totals.bytes_to_device == report.totals.forecast.bytes_to_device > 0
    assert report.totals.recomputed_flops == report.totals.forecast.recomputed_flops
    return report


def assert_nothing_held(model: nn.Module) -> None:
    """No host bytes in use, nothing of a stash alive, no copy open."""
    gc.collect()
    left = totals(model)
    assert (left.host_bytes_in_use, left.stash_bytes, left.open_copies) == (0, 0, 0)


def refused(error: type[Exception], call: Callable[..., Any], *args: Any, **how: Any) -> str:
    """The message of the ``error`` that ``call`` raises; its traceback, and what that holds, is let go."""
    message = None
    try:
        call(*args, **how)
    except error as caught:
        message = str(caught) if type(caught) is error else None
    if message is None:
        raise AssertionError(f"{error.__name__} was not raised")
    return message
