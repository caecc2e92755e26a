"""Budgets on a GPU in steps that start with gradients, and in those that do not."""

import pytest
import torch
from torch import nn

import memo_runtime as memo

pytestmark = pytest.mark.gpu
HIDDEN, TOKENS = 1024, 8192


class Mlp(nn.Module):
    """Large weights for few activations, so that gradients matter."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(blocks))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def made():
    torch.manual_seed(0)
    return Stack(8).to("cuda", torch.bfloat16)


def peak_of_step(model, inputs):
    torch.cuda.reset_peak_memory_stats()
    model(inputs).backward(torch.ones_like(inputs))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_budget_holds_with_and_without_gradients(share):
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    inputs = torch.randn(1, TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    profile = memo.profile(model, inputs, optimizer=optimizer)
    floor = memo.plan(profile, policy="recompute", keep_last=0).forecast.peak_bytes + profile.states.gradients
    most = max(memo.plan(profile, policy="none").forecast.peak_bytes, floor)
    budget = int(floor + share * (most - floor))
    memo.wrap(model, policy="auto", budget=f"{budget}B", optimizer=optimizer)
    for _ in range(3):
        for number in range(3):
            inputs.grad = None
            peak = peak_of_step(model, inputs)
            report = memo.report(model)
            forecast = report.totals.forecast.peak_bytes
            assert peak <= budget, f"step {number}, {torch.cuda.memory_allocated()} bytes stay\n{report}\n{profile}"
            assert peak <= forecast <= budget
        model.zero_grad(set_to_none=True)
    memo.unwrap(model)


def test_comparing_a_rerun_with_its_forward_takes_one_sample_of_device_memory():
    model = made()
    inputs = torch.randn(1, TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    plan = memo.plan(memo.profile(model, inputs), policy="recompute", keep_last=0)
    memo.wrap(model, plan=plan)
    peaks = []
    for _ in range(3):  # only the first step under a plan compares
        inputs.grad = None
        model.zero_grad(set_to_none=True)
        peaks.append(peak_of_step(model, inputs))
    assert peaks[1] == peaks[2]
    assert 0 <= peaks[0] - peaks[1] <= 8 * 4 * HIDDEN * 2 + 1024
    assert peaks[0] <= plan.forecast.peak_bytes
    memo.unwrap(model)
