"""Blocks whose forward depends on what earlier forwards left, over several optimizer steps."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import memo_runtime as memo
from tests.exactness.compare import Way, relative_error, take_gradients
from tests.exactness.hand_written import WIDTH, Attention, sequence
from tests.exactness.test_state import WAYS

TOKENS, STEPS = 40, 5


class Averaging(Attention):
    """A running mean as a buffer that is written to before its use."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)
        return super().forward(x - self.mean)


class Assigning(Averaging):
    """The same as a buffer that is exchanged after its use."""

    def forward(self, x: Tensor) -> Tensor:
        y = Attention.forward(self, x - self.mean)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        return y


class EverySecond(Attention):
    """Another path every second step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.extra = 0, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = super().forward(x)
        return y if self.calls % 2 else y + torch.tanh(self.extra(y))


class Caching(Attention):
    """A table that is filled in the first forward of each length."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        if tokens not in self.cache:
            self.cache[tokens] = torch.sin(torch.arange(tokens, dtype=x.dtype)[:, None] / torch.arange(1, WIDTH + 1))
        return super().forward(x + self.cache[tokens])


class Skipped(Attention):
    """Left out at random, by Python's generator."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.0 if random.random() < 0.4 else super().forward(x)


class SpectralNorm(Attention):
    """A power iteration in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.last = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(super().forward(x))


class Adapter(Attention):
    """A frozen layer with a low-rank one beside it, behind dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.first, self.second, self.dropout = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.second(self.first(self.dropout(x)))


class PerTensorScale(Attention):
    """Rounded to a grid that the largest value of all tokens sets, with a straight-through gradient."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.detach().abs().max() / 127
        return super().forward(x + ((x / scale).round() * scale - x).detach())


class Model(nn.Module):
    """Three blocks; ``tied``: two share their attention."""

    def __init__(self, kind: type[nn.Module], *, tied: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(kind() for _ in range(3))
        if tied:
            for name, child in self.layers[0].named_children():
                setattr(self.layers[2], name, child)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean() + 1e-3 * x.sum()


def model_of(kind: type[nn.Module], **settings: Any) -> Model:
    torch.manual_seed(0)
    return Model(kind, **settings).double().train()


def assert_trains_alike(plain: Model, wrapped: Model) -> None:
    """Losses, gradients and all state, step by step; the last step is shorter."""
    models = (plain, wrapped)
    optimizers = [torch.optim.SGD((p for p in m.parameters() if p.requires_grad), lr=0.05) for m in models]
    for step in range(STEPS):
        tokens = TOKENS if step < STEPS - 1 else TOKENS - 7
        x = torch.randn(2, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        losses, gradients = [], []
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(10 + step)
            random.seed(10 + step)
            loss = model(x)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            gradients.append(take_gradients(model))
        assert losses[1] == pytest.approx(losses[0], rel=1e-11)
        assert relative_error(gradients[1], gradients[0]) <= 1e-11
    now = plain.state_dict(), wrapped.state_dict()
    assert now[0].keys() == now[1].keys()
    assert all(torch.allclose(now[1][name], now[0][name], rtol=1e-10, atol=1e-12) for name in now[0])


KINDS = [Averaging, Assigning, EverySecond, Caching, Skipped, SpectralNorm, Adapter, PerTensorScale]


#: Who goes on by what a whole run leaves behind, and who by what one of a part does: both ways of running again.
BOTH = (Averaging, Skipped, SpectralNorm)


@pytest.mark.parametrize(("policy", "alpha", "kind"), [
    pytest.param(policy, alpha, kind, marks=() if policy == "memo" or (policy == "recompute" and kind in BOTH)
                 else pytest.mark.slow, id=f"{policy}-{alpha}-{kind.__name__}")
    for policy, alpha in (("swap", None), ("recompute", None), ("memo", 0.37)) for kind in KINDS
])  # fmt: skip
def test_blocks_that_go_on_from_their_last_forward(kind: type[nn.Module], policy: str, alpha: float | None) -> None:
    wrapped = memo.wrap(model_of(kind), policy=policy, alpha=alpha, keep_last=0)
    assert_trains_alike(model_of(kind), wrapped)
    assert any(block.bytes_to_host for block in memo.report(wrapped).blocks)


@pytest.mark.parametrize(("policy", "alpha"), WAYS)
def test_blocks_that_share_modules(policy: str, alpha: float | None) -> None:
    wrapped = Way(policy, alpha).wrap(model_of(Attention, tied=True))
    assert_trains_alike(model_of(Attention, tied=True), wrapped)


class Pointwise(nn.Module):
    """Takes nested tensors too."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(x).sin()


@pytest.mark.parametrize("policy", ["swap", "memo", "tiled", "auto"])
def test_nested_hidden_states_are_left_alone(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    """Sequences of their own lengths have no number of tokens: every step is the unwrapped model's."""
    torch.manual_seed(0)
    plain = nn.Sequential(*[Pointwise() for _ in range(3)]).double()
    model = memo.wrap(copy.deepcopy(plain), policy=policy)
    for _ in range(2):
        parts = [torch.randn(tokens, WIDTH, dtype=torch.float64) for tokens in (5, 9)]
        gradients = []
        for one in (model, plain):
            one.zero_grad()
            one(torch.nested.as_nested_tensor(parts, layout=torch.jagged)).values().square().sum().backward()
            gradients.append([parameter.grad for parameter in one.parameters()])
        assert all(map(torch.equal, *gradients))
    assert f"cannot take policy '{policy}'" in caplog.text


class Compiled(nn.Module):
    """What torch.jit is given: it counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):  # type: ignore[no-untyped-def]
        self.count.add_(1)  # type: ignore[operator]
        return torch.tanh(self.linear(x)) * self.count


class HoldsCompiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.inner = nn.Linear(WIDTH, WIDTH), torch.jit.script(Compiled())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.linear(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("policy", ["swap", "recompute", "tiled", "auto"])
def test_modules_of_torch_jit_inside_a_block_leave_it_alone(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    """Their tables are not Python's, their operators not seen; what their buffers count is counted once."""
    found = []
    for wrapped in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(*[HoldsCompiled() for _ in range(3)], torch.jit.script(nn.Linear(WIDTH, WIDTH))).double()
        if wrapped:
            memo.wrap(model, policy=policy)
        for _ in range(2):
            model(sequence()).square().sum().backward()
        found.append([*(one.grad for one in model.parameters()), *model.buffers()])
    assert all(map(torch.equal, *found))
    assert f"cannot take policy '{policy}'" in caplog.text
