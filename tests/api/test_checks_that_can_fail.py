"""What is there to find errors has to be able to find them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.errors import ReplayMismatchError


class LongShift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(torch.cat([x, functional.pad(x, (0, 0, 700, 0))[:, : x.shape[1]]], -1))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(LongShift(), nn.GELU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def test_check_without_arguments_runs_blocks_again():
    result = memo.check(Tower().double(), torch.randn(1, 64, 16, dtype=torch.float64))
    assert result.ok
    assert result.report.totals.bytes_to_host > 0
    assert result.report.totals.recomputed_flops > 0


def test_check_without_arguments_finds_a_wrong_rerun():
    with pytest.raises(ReplayMismatchError):
        memo.check(Tower().double(), torch.randn(1, 1500, 16, dtype=torch.float64))


@pytest.mark.parametrize("name", ["nolib::noop", "aten::no_such_operator", "scan", "aten::"])
def test_a_mixer_that_there_is_not_is_refused(name):
    with pytest.raises(ValueError, match=r"operator"):
        memo.register_mixer(name)


def test_a_mixer_that_there_is_is_taken():
    memo.register_mixer("aten::cumsum")
