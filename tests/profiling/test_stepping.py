"""What is counted for an optimizer's step, against the most that the CPU's allocations reach while it steps."""

import pytest
import torch
from torch import nn

from memo_runtime.profiling.states import measure_states
from memo_runtime.profiling.stepping import stepping_of
from memo_runtime.rehearsal.cpu_peak import cpu_peak

SHAPES = ((1024, 512), (512, 256), (256,), (96, 256), (512, 512))
LARGEST, SECOND = 4 * 1024 * 512, 4 * 512 * 512
EVERYTHING = 4 * sum(torch.Size(shape).numel() for shape in SHAPES)
#: Step counters, a scalar each, stay on the CPU; here they are among what is counted there.
COUNTERS = 1024

KINDS = {
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "Adam": (torch.optim.Adam, {}),
    "Adam decay": (torch.optim.Adam, {"weight_decay": 0.1}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD nesterov": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "RMSprop": (torch.optim.RMSprop, {"centered": True}),
}
#: What torch.optim's own lines come to, in bytes.
COUNTED = {
    ("AdamW", True): EVERYTHING,
    # Square roots and what they are divided by.
    ("AdamW", False): 2 * LARGEST,
    ("Adam decay", False): 3 * LARGEST,
    ("SGD", True): 0,
    ("SGD", False): 0,
    ("SGD nesterov", True): EVERYTHING,
    ("Adafactor", True): EVERYTHING,
}


def made(name, *, dtype=torch.float32, **options):
    kind, own = KINDS[name]
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return kind(parameters, lr=1e-3, **own, **options)


def device_states(optimizer):
    """Bytes of states that grow with parameters."""
    return sum(one.nbytes for state in optimizer.state.values() for one in state.values() if getattr(one, "ndim", 0))


@pytest.mark.parametrize("at_once", [True, False], ids=["foreach", "one by one"])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_counted_is_what_a_step_takes(name, at_once):
    optimizer = made(name, foreach=at_once)
    counted = stepping_of(optimizer, "cpu")
    before = device_states(optimizer)
    first = cpu_peak(optimizer.step, 0) - (device_states(optimizer) - before)
    steady = cpu_peak(optimizer.step, 0)
    assert counted.states == device_states(optimizer)
    assert counted.temporaries == pytest.approx(max(first, steady), abs=COUNTERS)
    assert counted.temporaries == COUNTED.get((name, at_once), counted.temporaries)


def test_fused_kernels_need_no_room():
    optimizer = made("AdamW", fused=True)
    assert stepping_of(optimizer, "cuda").temporaries == 0
    cpu_peak(optimizer.step, 0)
    assert cpu_peak(optimizer.step, 0) <= COUNTERS


def test_on_a_gpu_all_parameters_step_at_once_where_nobody_says_otherwise():
    """``_default_to_fused_or_foreach`` of torch.optim; Adafactor's documentation."""
    assert stepping_of(made("AdamW"), "cuda").temporaries == EVERYTHING
    assert stepping_of(made("AdamW"), "cpu").temporaries == 2 * LARGEST
    assert stepping_of(made("AdamW", dtype=torch.bfloat16), "cuda").temporaries == EVERYTHING // 2
    assert stepping_of(made("AdamW", foreach=False), "cuda").temporaries == 2 * LARGEST
    assert stepping_of(made("Adafactor"), "cuda").temporaries < LARGEST + SECOND
    counted = made("AdamW")
    for group in counted.param_groups:
        group["lr"] = torch.tensor(1e-3)
    assert stepping_of(counted, "cuda").temporaries == 2 * LARGEST


def test_groups_step_one_after_another():
    optimizer = made("AdamW")
    *others, last = optimizer.param_groups[0]["params"]
    groups = torch.optim.AdamW([{"params": others}, {"params": [last], "foreach": False}], lr=1e-3)
    assert stepping_of(groups, "cuda").temporaries == EVERYTHING - last.nbytes


def test_states_that_are_there_do_not_hide_what_a_step_takes():
    optimizer = made("AdamW")
    model = nn.ParameterList(optimizer.param_groups[0]["params"])
    before = measure_states(model, optimizer, "cpu")
    optimizer.step()
    after = measure_states(model, optimizer, "cpu")
    assert (before.optimizer_present, before.optimizer) == (0, 2 * EVERYTHING)
    assert after.optimizer_present == after.optimizer == pytest.approx(2 * EVERYTHING, abs=COUNTERS)
    assert before.stepping == after.stepping == 2 * LARGEST
    assert measure_states(model, None, "cuda").stepping == 0


def test_a_class_that_needs_data_says_nothing():
    class Reading(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.numpy()

    model = nn.Linear(4, 4)
    found = measure_states(model, Reading(model.parameters(), lr=0.1), "cuda")
    assert (found.assumed, found.optimizer_name, found.stepping) == (True, "AdamW", 0)


def test_an_optimizer_is_asked_once_until_it_is_another(monkeypatch) -> None:
    weights = [nn.Parameter(torch.zeros(64, 32)), nn.Parameter(torch.zeros(1000))]
    optimizer, calls = torch.optim.AdamW(weights, foreach=False), []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: calls.append(1))
    stepping_of(optimizer, "cuda")
    once = len(calls)
    optimizer.param_groups[0]["lr"] = 0.5
    stepping_of(optimizer, "cuda")
    assert len(calls) == once > 0
    weights[0].requires_grad_(False)
    stepping_of(optimizer, "cuda")
    assert len(calls) == 2 * once
    optimizer.param_groups[0]["amsgrad"] = True
    stepping_of(optimizer, "cuda")
    assert len(calls) == 3 * once


def moved(optimizer) -> int:
    found = stepping_of(optimizer, "cuda")
    assert found is not None
    return found.moved


def test_what_a_step_reads_and_writes() -> None:
    weights = [nn.Parameter(torch.zeros(64, 32)), nn.Parameter(torch.zeros(1000))]
    size = sum(one.nbytes for one in weights)
    # Parameters both ways, gradients, and of AdamW two states both ways.
    fused = moved(torch.optim.AdamW(weights, fused=True))
    assert 0 <= fused - (2 + 1 + 4) * size < 1024  # step counters
    # PyTorch's other steps go over all of it again for each operator.
    assert moved(torch.optim.AdamW(weights, foreach=True)) > 1.5 * fused
    # A parameter is read and written, its gradient read.
    assert moved(torch.optim.SGD(weights, lr=0.1, foreach=False)) == 3 * size
    assert moved(torch.optim.SGD(weights, lr=0.1)) == 3 * size
