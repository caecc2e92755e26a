"""MEMO's closed form against the numbers of the paper (7B to 65B, 1M tokens, a node of 2,000 GiB)."""

import pytest

from memo_runtime.planning.memo_alpha import SwapDemand, crossover_tokens, memo_alpha
from memo_runtime.units import GiB

MILLION = 1024**2
MODELS = {"7B": (32, 4096), "13B": (40, 5120), "30B": (48, 7168), "65B": (80, 8192)}


def unit(hidden, tokens=MILLION):
    """Bytes of one b s h tensor in 16 bits, batch 1."""
    return tokens * hidden * 2


def gpt_layers(name, seconds=float("inf")):
    """The n - 2 swapped layers: input and attention output whole, 14 b s h by alpha."""
    layers, hidden = MODELS[name]
    one = SwapDemand(fixed_bytes=2 * unit(hidden), token_bytes=14 * unit(hidden), forward_seconds=seconds)
    return [one] * (layers - 2)


@pytest.mark.parametrize(("name", "alpha"), [("7B", 0.45), ("13B", 0.23), ("30B", 0.08)])
def test_alpha_that_host_memory_allows(name, alpha):
    found = memo_alpha(gpt_layers(name), to_host_rate=32e9, host_bytes=2000 * GiB)
    assert found.alpha == pytest.approx(alpha, abs=0.005)
    assert found.fits_host
    assert found.binding == "host memory binds"


def test_65b_does_not_fit_even_at_zero():
    layers = gpt_layers("65B")
    found = memo_alpha(layers, to_host_rate=32e9, host_bytes=2000 * GiB)
    assert sum(layer.fixed_bytes for layer in layers) == 2496 * GiB
    assert not found.fits_host
    assert found.alpha == 0.0


def test_all_skeletal_activations_of_7b_at_a_million_tokens():
    # The paper prints 4096 GB and means GiB.
    assert 32 * 16 * unit(4096) == 4096 * GiB


def test_alpha_that_the_link_allows():
    hidden = 4096
    seconds = 9 * unit(hidden) / 12e9
    found = memo_alpha(gpt_layers("7B", seconds), to_host_rate=12e9, host_bytes=10**16)
    assert found.alpha == pytest.approx(0.5)
    assert found.binding == "the link binds"


def test_alpha_is_clipped_at_both_ends():
    assert memo_alpha(gpt_layers("7B", 1e9), to_host_rate=12e9, host_bytes=10**16).alpha == 1.0
    assert memo_alpha(gpt_layers("7B", 1e-9), to_host_rate=12e9, host_bytes=10**16).alpha == 0.0


def test_the_slowest_link_demand_decides_and_an_unmeasured_link_does_not():
    fast, slow = (SwapDemand(fixed_bytes=10, token_bytes=100, forward_seconds=s) for s in (1.0, 0.5))
    assert memo_alpha([fast, slow], to_host_rate=100, host_bytes=10**9).alpha == pytest.approx(0.4)
    assert memo_alpha([fast, slow], to_host_rate=0, host_bytes=10**9).alpha == 1.0


def test_nothing_to_swap_is_everything_swapped():
    assert memo_alpha([], to_host_rate=1.0, host_bytes=0).alpha == 1.0


def test_crossover_of_the_paper():
    assert crossover_tokens(1.0, 15_400, 4096) / 1024 == pytest.approx(192, abs=1)


@pytest.mark.parametrize(("flops", "thousands"), [(400e12, 77), (550e12, 124)])
def test_crossover_on_h100_with_a_link_of_50_gb(flops, thousands):
    assert crossover_tokens(1.0, flops / 50e9, 4096) / 1024 == pytest.approx(thousands, abs=0.5)


def test_inputs_and_attention_outputs_hide_at_any_length():
    assert crossover_tokens(0.0, 400e12 / 50e9, 4096) < 0
