"""Machines by name, and that every figure has a source."""

import pytest

from memo_runtime.errors import ArgumentError
from memo_runtime.machines.catalogue import MACHINES, find_machine
from memo_runtime.reporting.mfu import peak_flops


def test_the_machines_that_are_wanted_are_there():
    for name in ("a800-80gb", "a100-80gb", "a100-40gb", "h100-80gb", "h200-141gb", "b200-180gb", "rtx-4090"):
        assert find_machine(name).name == name


@pytest.mark.parametrize(("given", "name"), [("h100", "h100-80gb"), ("H100_80GB", "h100-80gb"), ("b200", "b200-180gb")])
def test_short_names_are_enough_where_they_are_clear(given, name):
    assert find_machine(given).name == name


@pytest.mark.parametrize(
    ("given", "said"),
    [("a100", "a100-40gb or a100-80gb"), ("h10-80gb", "did you mean h100-80gb"), ("tpu", "there are a800-80gb")],
)
def test_unknown_names_say_what_is_near(given, said):
    with pytest.raises(ArgumentError, match=said):
        find_machine(given)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=lambda machine: machine.name)
def test_figures_are_sound_and_have_sources(machine):
    peak = peak_flops(machine.device)
    assert machine.peak_flops == peak.flops
    assert any(peak.source in source for source in machine.sources)
    assert 0 < machine.shared_link_rate <= machine.link_rate <= machine.gpu_rate <= machine.memory_rate
    shares = machine.shares
    for share in (shares.matmul, shares.attention_forward, shares.attention_backward, shares.elementwise):
        assert 0.3 < share < 1
    text = " ".join(machine.sources)
    assert "GB/s" in text
    assert shares.source in machine.sources
    assert len(machine.sources) >= 4
