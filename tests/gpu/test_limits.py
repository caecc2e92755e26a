"""A step that takes more than its plan's limit says so, and the statistics of PyTorch are left to the user."""

import logging

import pytest
import torch
from torch import nn

import memo_runtime as memo

pytestmark = pytest.mark.gpu
WIDTH, TOKENS = 512, 4096


class Rounds(nn.Module):
    """Saves more with every round, of which a profile knows those of its first call."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, rounds):
        for _ in range(rounds):
            x = torch.tanh(self.up(x))
        return x


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Rounds() for _ in range(4))
        self.rounds = 1

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, self.rounds)
        return x.square().mean()


def test_the_part_of_a_device_that_a_process_may_take_is_the_limit():
    model, x = Stack().cuda(), torch.randn(1, TOKENS, WIDTH, device="cuda")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.25)
    try:
        profile = memo.profile(model, x)
        limits = memo.plan(profile).limits
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert profile.device_bytes == total // 4
    assert total // 8 < limits.device_bytes <= total // 4


def test_a_broken_limit_is_said_once_and_no_statistic_is_reset(caplog):
    torch.manual_seed(0)
    model, x = Stack().cuda(), torch.randn(1, TOKENS, WIDTH, device="cuda")
    needs = memo.plan(memo.profile(model, x), policy="swap", keep_last=0).forecast.peak_bytes
    memo.wrap(model, policy="swap", keep_last=0, budget=needs + (1 << 20))
    model(x).backward()
    assert torch.cuda.max_memory_allocated() <= needs + (1 << 20)
    assert not any("more than the limit of its plan" in note for note in memo.report(model).notes)
    model.rounds = 8
    with caplog.at_level(logging.WARNING, "memo_runtime"):
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            model(x).backward()
    highest = torch.cuda.max_memory_allocated()
    model.rounds = 1
    model.zero_grad(set_to_none=True)
    model(x).backward()
    assert torch.cuda.max_memory_allocated() == highest > needs + (1 << 20)
    said = [record.message for record in caplog.records if "more than the limit of its plan" in record.message]
    assert len(said) == 1
    assert said[0] in memo.report(model).notes
    memo.unwrap(model)
