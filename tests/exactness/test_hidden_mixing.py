"""Mixing of tokens that the first batch hides: it is the same for all tokens, or what is mixed begins at zero.

Reruns are compared as on CUDA, the first time alone: what the profile does not see is a wrong gradient there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.execution.session import Session
from memo_runtime.records import BlockPlan
from tests.exactness.compare import relative_error, take_gradients
from tests.tiny import few_samples, one_thread

__all__ = ["few_samples", "one_thread"]

WIDTH, HEADS, TOKENS, STEPS = 16, 4, 300, 3
#: Batches of the first step: one token everywhere, or any, where weights are zero.
BEGINNINGS = ["same tokens", "zero weights"]


def _back(x: Tensor) -> Tensor:
    """Tokens in the other direction."""
    return torch.arange(x.shape[1] - 1, -1, -1)


def _as_heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2).flatten(0, 1)


def _as_tokens(x: Tensor) -> Tensor:
    return x.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)


def _as_strided(x: Tensor) -> Tensor:
    rows, tokens, width = x.shape
    padded = functional.pad(x, (0, 0, 1, 0))
    return padded.as_strided((rows, tokens, width), padded.stride())


def _normed_heads(x: Tensor) -> Tensor:
    """Token-wise, in rows of heads times tokens."""
    rows = _as_heads(x).flatten(0, 1)
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-6)
    return _as_tokens(rows.unflatten(0, (-1, x.shape[1]))).exp()


MIXINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "index": lambda x: x[:, _back(x)],
    "index of heads": lambda x: _as_tokens(_as_heads(x)[:, _back(x)]).exp(),
    "index_select": lambda x: x.index_select(1, _back(x)),
    "index_copy": lambda x: torch.zeros_like(x).index_copy(1, _back(x), x),
    "gather": lambda x: x.gather(1, _back(x)[None, :, None].expand_as(x)),
    "scatter_add": lambda x: x.scatter_add(1, _back(x)[None, :, None].expand_as(x), x),
    "as_strided": _as_strided,
    "other view": lambda x: x.view(x.shape[0], x.shape[2], x.shape[1]).mT,
    "roll": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(1),
    "cat": lambda x: torch.cat([x[:, :1], x[:, :-1]], 1),
    "pad": lambda x: functional.pad(x, (0, 0, 1, 0))[:, :-1],
    "every second": lambda x: x[:, ::2].repeat_interleave(2, 1)[:, : x.shape[1]],
    "pad and cut": lambda x: functional.pad(x, (0, 0, 1, 0))[:, : x.shape[1]],
    "normed heads": _normed_heads,
}


class Block(nn.Module):
    def __init__(self, mixing: str) -> None:
        super().__init__()
        self.norm, self.linear, self.mixing = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), mixing

    def mixed(self, x: Tensor) -> Tensor:
        return MIXINGS[self.mixing](x)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.mixed(torch.tanh(self.linear(self.norm(x))))
        return x + hidden * hidden.sin()


class Causal(Block):
    """A convolution that is padded on both sides and cut, as Mamba's."""

    def __init__(self) -> None:
        super().__init__("")
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2)

    def mixed(self, x: Tensor) -> Tensor:
        return self.convolution(x.mT)[..., : x.shape[1]].mT


class ByHead(Block):
    """Token-wise, by a part for heads that begins at zero, on rows of tokens times heads or of heads times tokens."""

    def __init__(self, *, heads_first: bool, seen: bool = True) -> None:
        super().__init__("")
        self.up, self.down, self.seen = nn.Linear(WIDTH // HEADS, 8), nn.Linear(8, WIDTH // HEADS), seen
        self.heads_first = heads_first

    def mixed(self, x: Tensor) -> Tensor:
        heads = x.unflatten(2, (HEADS, -1))
        if self.heads_first:
            heads = heads.transpose(1, 2)
        rows = heads.flatten(0, 2) if self.seen else as_rows(heads)
        heads = self.down(functional.gelu(self.up(rows))).view(heads.shape)
        return (heads.transpose(1, 2) if self.heads_first else heads).flatten(2)


@torch.library.custom_op("memo_hidden::as_rows", mutates_args=())
def as_rows(x: Tensor) -> Tensor:
    """No view: what this does nobody asks."""
    return x.flatten(0, 2).clone()


as_rows.register_autograd(
    lambda ctx, gradient: gradient.view(ctx.shape),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "shape", inputs[0].shape),
)


class Tower(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(make() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return x.cos().sum()


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rerun of a plan is compared, and no other."""

    def asks(self: Session, name: str, plan: BlockPlan) -> bool:
        key = name, plan.tokens, plan.prefix
        first = key not in self._witnessed
        self._witnessed.add(key)
        return first

    monkeypatch.setattr(Session, "asks_for_witness", asks)


def _learn(model: nn.Module, step: int) -> None:
    """The same for every model."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def _train(plain: nn.Module, *, same_at_first: bool) -> nn.Module:
    """The model wrapped, after some steps beside ``plain``, all exact."""
    model = memo.wrap(copy.deepcopy(plain), policy="memo", alpha=0.3, keep_last=0)
    for step in range(STEPS):
        ids = torch.randint(50, (2, TOKENS), generator=torch.Generator().manual_seed(step))
        found = []
        for each in (plain, model):
            each(torch.zeros_like(ids) if same_at_first and not step else ids).backward()
            found.append(take_gradients(each))
        assert relative_error(*found) <= 1e-12
        for each in (plain, model):
            _learn(each, step)
    return model


@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_mixing_that_the_first_batch_hides_is_exact_when_it_shows(mixing, beginning):
    torch.manual_seed(0)
    plain = Tower(lambda: Block(mixing)).double()
    if beginning == "zero weights":
        for layer in plain.layers:
            nn.init.zeros_(layer.linear.weight)
            nn.init.zeros_(layer.linear.bias)
    _train(plain, same_at_first=beginning == "same tokens")


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_a_causal_convolution_is_exact_when_its_weights_have_grown(beginning):
    torch.manual_seed(0)
    plain = Tower(Causal).double()
    for layer in plain.layers:
        nn.init.zeros_(layer.convolution.weight)
        nn.init.zeros_(layer.convolution.bias)
    model = _train(plain, same_at_first=beginning == "same tokens")
    assert all(block.recomputed_flops > 0 for block in memo.report(model).blocks)


def _zero(model: nn.Module) -> nn.Module:
    for layer in model.layers:
        nn.init.zeros_(layer.up.weight)
        nn.init.zeros_(layer.up.bias)
    return model


@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("heads_first", [False, True])
def test_rows_of_heads_that_begin_at_zero_are_sliced(heads_first, beginning):
    torch.manual_seed(0)
    plain = _zero(Tower(lambda: ByHead(heads_first=heads_first))).double()
    model = _train(plain, same_at_first=beginning == "same tokens")
    assert [(block.alpha > 0, block.reason) for block in memo.report(model).blocks] == [(True, "")] * 2


def test_rows_of_heads_that_nothing_tells_are_not_sliced():
    torch.manual_seed(0)
    plain = _zero(Tower(lambda: ByHead(heads_first=True, seen=False))).double()
    for layer in plain.layers:
        nn.init.zeros_(layer.linear.weight)
        nn.init.zeros_(layer.linear.bias)
    model = _train(plain, same_at_first=False)
    assert all("does not show where its tokens are" in block.reason for block in memo.report(model).blocks)
