"""Seconds of an optimizer's step in a forecast."""

import pytest
import torch
from torch import nn

from memo_runtime.offline.optimizers import find_optimizer
from memo_runtime.profiling.optimizer_time import memory_rate, moved_bytes, with_optimizer
from memo_runtime.records import Growth


def model(device="cpu", width=64):
    made = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)).to(device)
    made[0].requires_grad_(False)
    return made


class Own(torch.optim.Optimizer):
    """Cannot step without data."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        raise RuntimeError("no")


def test_without_an_optimizer_a_fused_adamw_is_assumed_and_so_it_is_of_one_that_cannot_be_asked():
    one = model()
    trained = sum(p.nbytes for p in one[1].parameters())
    assert moved_bytes(one, None) == 7 * trained
    assert moved_bytes(one, Own(one.parameters())) == 7 * trained
    assert find_optimizer("adamw").moved(one) == 7 * trained
    assert find_optimizer("none").moved(one) == 0
    assert find_optimizer("adamw-foreach").moved(one) > 10 * trained


def test_steps_on_a_cpu_are_not_forecast():
    seconds = Growth(constant=1.0, linear=2.0)
    assert with_optimizer(seconds, model(), None) == seconds


@pytest.mark.gpu
@pytest.mark.parametrize("foreach", [False, True])
def test_a_step_takes_about_what_is_forecast(foreach):
    one = model("cuda", 16384).bfloat16()
    optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], fused=not foreach, foreach=foreach)
    forecast = with_optimizer(Growth(), one, optimizer).constant
    for p in one[1].parameters():
        p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(5):
        optimizer.step()
    end.record()
    torch.cuda.synchronize()
    assert forecast == pytest.approx(begin.elapsed_time(end) / 5000, rel=0.3)
    assert memory_rate(torch.device("cuda", 0)) > 1e11
