"""What a short crop cannot show, and what changes between forward and backward: an error, never a gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.errors import ReplayMismatchError

WIDTH = 16


class LongShift(nn.Module):
    """Reads a token that lies farther back than the crop is long."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        far = functional.pad(x, (0, 0, 700, 0))[:, : x.shape[1]]
        return x + functional.gelu(self.linear(torch.cat([x, far], -1)))


class FirstTokens(nn.Module):
    """Treats tokens beyond the crop in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.full((x.shape[1], 1), 2.0, dtype=x.dtype)
        weight[:400] = 0.5
        return x + functional.gelu(self.linear(x * weight))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(x) * self.scale))


class ZeroScan(nn.Module):
    """A cumulative sum that starts as nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.gelu(self.linear(x + torch.cumsum(self.value(x), 1)))


class DiracConvolution(nn.Module):
    """A convolution over time that starts as the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.Linear(WIDTH, WIDTH)
        nn.init.dirac_(self.convolution.weight)
        nn.init.zeros_(self.convolution.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.gelu(self.linear(self.convolution(x.transpose(1, 2)).transpose(1, 2)))


class Tower(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def tower(kind: type[nn.Module]) -> Tower:
    torch.manual_seed(0)
    return Tower(kind).double()


def sequence(tokens: int) -> Tensor:
    return torch.randn(2, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_shift_that_is_longer_than_the_crop_is_exact():
    """All that is cut out of padding is zeros there, and would be at other tokens."""
    plain = tower(LongShift)
    model = memo.wrap(copy.deepcopy(plain), policy="memo", alpha=0.37, keep_last=0)
    for each in (plain, model):
        each(sequence(1500)).backward()
    assert all(block.recomputed_flops > 0 for block in memo.report(model).blocks)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.linalg.vector_norm(p.grad - q.grad) <= 1e-12 * torch.linalg.vector_norm(p.grad)


def test_what_a_crop_cannot_show_is_an_error():
    model = memo.wrap(tower(FirstTokens), policy="memo", alpha=0.37, keep_last=0)
    with pytest.raises(ReplayMismatchError, match="policy='swap'"):
        model(sequence(1500)).backward()
    memo.unwrap(model)
    model.zero_grad(set_to_none=True)
    model(sequence(1500)).backward()


@pytest.mark.parametrize("kind", [ZeroScan, DiracConvolution])
def test_mixers_that_start_as_nothing_stay_exact_while_they_learn(kind):
    plain = tower(kind)
    model = memo.wrap(copy.deepcopy(plain), policy="memo", alpha=0.37, keep_last=0)
    optimizers = [torch.optim.SGD(each.parameters(), 0.05) for each in (plain, model)]
    for _ in range(4):
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            each(sequence(96)).backward()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert torch.linalg.vector_norm(p.grad - q.grad) <= 1e-12 * torch.linalg.vector_norm(p.grad) + 1e-14
        for optimizer in optimizers:
            optimizer.step()


RERUNS = [("recompute", None), ("memo", 0.37)]


@pytest.mark.parametrize(("policy", "alpha"), [("swap", None), *RERUNS])
def test_a_weight_that_was_written_to_is_the_error_that_it_is_without_memo(policy, alpha):
    model = memo.wrap(tower(Plain), policy=policy, alpha=alpha, keep_last=0)
    loss = model(sequence(96))
    with torch.no_grad():
        model.layers[1].down.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match=r"inplace operation|made something else"):
        loss.backward()


class TimeNorm(nn.Module):
    """Normalises over tokens, which changes a result by less than bfloat16's tolerance."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(64, 64), nn.GroupNorm(1, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(functional.relu(self.first(x)).transpose(1, 2)).transpose(1, 2)
        return x + self.second(functional.gelu(normed))


def test_a_norm_over_tokens_in_bfloat16_is_no_worse_than_the_unwrapped_model():
    ratios = []
    for seed in range(5):
        torch.manual_seed(seed)
        model = Tower(TimeNorm)
        model.stem = nn.Linear(64, 64)
        model = model.bfloat16()
        x = torch.randn(2, 400, 64).bfloat16()
        errors = []
        reference = copy.deepcopy(model).double()
        reference(x.double()).backward()
        for wrapped in (False, True):
            if wrapped:
                memo.wrap(model, policy="memo", alpha=0.37, keep_last=0)
            model.zero_grad(set_to_none=True)
            model(x).backward()
            pairs = list(zip(model.parameters(), reference.parameters(), strict=True))
            gap = sum((p.grad.double() - q.grad).square().sum() for p, q in pairs)
            errors.append(float(gap**0.5 / sum(q.grad.square().sum() for _, q in pairs) ** 0.5))
        ratios.append(errors[1] / errors[0])
    assert sorted(ratios)[2] <= 1.1
