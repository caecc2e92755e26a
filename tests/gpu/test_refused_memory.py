"""A cgroup leaves less host memory than the plan asks for: the run goes on within what there is, or stops before it."""

import itertools

import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.errors import HostLimitError, PinningError, PlanInfeasibleError
from memo_runtime.native import pool as pool_module
from memo_runtime.native.limits import Limit
from memo_runtime.units import MiB

pytestmark = pytest.mark.gpu
#: A block takes long enough to hide copies of more than its input, so that a plan with less host memory exists.
WIDTH, TOKENS = 2048, 1 << 13


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@pytest.fixture
def tight():
    """A model, its batch, a budget with which it needs host memory, and less of it, with which it still fits."""
    torch.manual_seed(0)
    model, x = Tower().cuda(), torch.randn(1, TOKENS, WIDTH, device="cuda")
    profile = memo.profile(model, x)
    most = memo.plan(profile, policy="none").forecast.peak_bytes
    for budget, eighths in itertools.product([most * share // 100 for share in (70, 60, 80, 90)], range(3, 8)):
        try:
            needed = memo.plan(profile, policy="replay", budget=budget).forecast.host_bytes
            memo.plan(profile, policy="replay", budget=budget, host_budget=needed * eighths // 8)
        except (HostLimitError, PlanInfeasibleError):
            continue
        if needed > 8 * MiB:
            return model, x, budget, needed * eighths // 8
    raise AssertionError("no plan with less host memory at any of these budgets")


def gradients(model, x):
    """Copies on the host, where no budget counts them."""
    model.zero_grad(set_to_none=True)
    model(x).backward()
    found = [parameter.grad.cpu() for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


def leave(monkeypatch, most):
    limit = Limit(free=most, total=64 << 30, source="cgroup v2 memory.max")
    monkeypatch.setattr(pool_module, "cgroup_limit", lambda: limit)


def test_pinned_memory_is_taken_for_what_there_is(tight, monkeypatch):
    model, x, budget, less = tight
    plain = gradients(model, x)
    leave(monkeypatch, less)
    memo.wrap(model, policy="replay", budget=budget, on_refusal="go_on")
    for _ in range(3):
        for mine, theirs in zip(gradients(model, x), plain, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
    report = memo.report(model)
    assert 0 < report.totals.host_bytes <= less
    (note,) = (note for note in report.notes if "the system gives" in note)
    assert "left by cgroup v2 memory.max: planned anew within that" in note
    memo.unwrap(model)


def test_by_default_nothing_runs_and_nothing_is_pinned(tight, monkeypatch):
    model, x, budget, less = tight
    leave(monkeypatch, less)
    memo.wrap(model, policy="replay", budget=budget)
    with pytest.raises(PinningError, match=r"left by cgroup v2 memory\.max") as error:
        gradients(model, x)
    assert "on_refusal='go_on'" in str(error.value)
    assert all(parameter.grad is None for parameter in model.parameters())
    monkeypatch.undo()
    gradients(model, x)
    assert memo.report(model).totals.host_bytes > less
    memo.unwrap(model)
