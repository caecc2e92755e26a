"""When ``layout='auto'`` places memory by plan, without a GPU: what it asks is answered by the test."""

from types import SimpleNamespace

import pytest
import torch

from memo_runtime.arena import auto
from memo_runtime.arena.model import StepMemory
from memo_runtime.errors import AllocatorUnavailableError

GIB = 2**30
CUDA = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """A device of which 80 GiB may be reserved, with the allocator built; what a test changes of it."""
    facts = SimpleNamespace(installed=0, built=True, others=False, refuses="")

    def install():
        if facts.refuses:
            raise AllocatorUnavailableError(facts.refuses)
        facts.installed += 1

    monkeypatch.setattr(auto, "allowed_bytes", lambda device: 80 * GIB)
    monkeypatch.setattr(auto, "is_planned_for_others", lambda device: facts.others)
    monkeypatch.setattr(auto, "allocator_status", lambda: SimpleNamespace(available=facts.built))
    monkeypatch.setattr(auto, "planned_allocator", lambda: SimpleNamespace(install=install))
    return facts


def memory(peak, device=CUDA):
    notes = []
    found = auto.memory_if_short(torch.nn.Linear(1, 1), None, notes.append, peak, device)
    return found, notes


def test_a_step_that_may_run_short_is_planned_and_it_is_said(machine):
    found, (note,) = memory(60 * GIB)
    assert isinstance(found, StepMemory)
    assert machine.installed == 1
    assert "a step needs 60.00 GiB of the 80.00 GiB that this process may reserve" in note


@pytest.mark.parametrize(
    ("change", "peak", "device"),
    [
        ({}, 50 * GIB, CUDA),
        ({}, 60 * GIB, torch.device("cpu")),
        ({"built": False}, 60 * GIB, CUDA),
        ({"others": True}, 60 * GIB, CUDA),
    ],
    ids=["there is room", "a CPU", "it is not built", "another model has the arena"],
)
def test_else_it_is_left_to_pytorch(machine, change, peak, device):
    vars(machine).update(change)
    assert memory(peak, device) == (None, [])
    assert machine.installed == 0


def test_another_allocator_stays_and_it_is_said(machine):
    machine.refuses = "cudaMallocAsync is in use"
    found, (note,) = memory(60 * GIB)
    assert found is None
    assert note == "memory of steps is left to PyTorch's allocator: cudaMallocAsync is in use"
