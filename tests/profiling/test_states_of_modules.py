"""Profiling runs a block several times; blocks that remember something from run to run must not notice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.profiling.states import gradients_of_blocks, measure_states


class Remembering(nn.Module):
    """Adds what it remembers of the last call, as recurrent blocks do between chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(self.inner(x))
        if self.state is not None:
            out = out + self.state
        self.state = out.mean(dim=(0, 1))
        return out


class Recurrent(nn.Module):
    """Forgets at the start of every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Remembering() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            layer.state = None
        for layer in self.layers:
            x = layer(x)
        return x


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_a_block_with_a_recurrent_state_trains_as_before():
    torch.manual_seed(0)
    model, x = Recurrent().double(), torch.randn(2, 16, 8, dtype=torch.float64)
    want = gradients(model, x)
    memo.wrap(model, policy="recompute", keep_last=0)
    for _ in range(3):
        got = gradients(model, x)
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(got, want, strict=True))


def test_profiling_leaves_the_state_as_it_was():
    model = Recurrent()
    before = model.layers[0].state
    memo.profile(model, torch.randn(2, 16, 8))
    assert model.layers[0].state is before


class Sharing(nn.Module):
    """A frozen parameter, one that two blocks share, one that a block shares with the head, and a float64 one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in range(3))
        self.head = nn.Linear(8, 8)
        self.layers[0]["a"].weight = self.layers[2]["a"].weight
        self.layers[1]["a"].weight = self.head.weight
        self.layers[1]["b"].weight.requires_grad_(False)
        self.layers[0]["b"].double()


def test_gradients_belong_to_the_block_that_goes_backward_first() -> None:
    model = Sharing()
    found = gradients_of_blocks(model, [(f"layers.{i}", layer) for i, layer in enumerate(model.layers)])
    weight, bias = 64 * 4, 8 * 4
    assert found == {
        "layers.0": bias + 2 * (weight + bias),
        "layers.1": 2 * bias,
        "layers.2": 2 * (weight + bias),
    }
    states = measure_states(model, None, "cpu")
    assert states.gradients - sum(found.values()) == weight + bias
    assert states.gradients == sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def test_a_profile_tells_the_gradients_of_each_block() -> None:
    model = Recurrent()
    profile = memo.profile(model, torch.randn(2, 24, 8))
    assert [block.gradients for block in profile.blocks] == [72 * 4] * 3
    assert profile.states.gradients == 3 * 72 * 4
