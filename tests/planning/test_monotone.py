"""What fits a budget fits a larger one, and what fits at a length fits at a shorter one, where both memories bind."""

import pytest

from memo_runtime.config import make_settings
from memo_runtime.planning.planner import make_plan
from memo_runtime.planning.sheet import Sheet, lengths_of
from memo_runtime.planning.suggest import is_feasible
from memo_runtime.records import Growth, Role
from memo_runtime.units import GiB
from tests.planning.builders import group, llama_block, llama_groups, profile_of

TOKENS = 40576


def unsaved_input(*, hidden, mlp, fixed=0):
    """What a Llama block saves where autograd does not save its input, with something of one size at any length."""
    of_llama = llama_groups(hidden=hidden, mlp=mlp)
    some = [group(Role.INPUT, one.size.linear, saved=False) if one.role is Role.INPUT else one for one in of_llama]
    return (*some, group(Role.FIXED, constant=fixed)) if fixed else tuple(some)


def model(count, **changes):
    blocks = [llama_block(number, tokens=TOKENS, **changes) for number in range(count)]
    return profile_of(blocks, outside_peak=Growth(linear=4096 * 3))


MODELS = {
    "small": model(10, groups=unsaved_input(hidden=2048, mlp=8192)),
    "fixed": model(8, groups=unsaved_input(hidden=2048, mlp=8192, fixed=GiB // 8)),
    "gradients": model(9, groups=unsaved_input(hidden=2048, mlp=8192), gradients=10**9),
}
ASKED = [
    {"policy": "replay"},
    {"policy": "replay", "keep_last": 0},
    {"policy": "auto", "keep_last": 3},
    {"policy": "auto"},
]


def feasible(profile, asked, device, host, tokens=TOKENS):
    settings = make_settings(**asked, budget=int(device), host_budget=int(host))
    return is_feasible(Sheet(profile, lengths_of(profile, {0: tokens})), settings)


def bounds(profile):
    """(least of the device, most of the device, host memory of inputs and mixers)."""
    most = make_plan(profile, make_settings(policy="none", budget="100TiB"))
    host = make_plan(profile, make_settings(policy="recompute", keep_last=0, budget="100TiB", host_budget="100TiB"))
    return most.floor_bytes, most.forecast.peak_bytes, host.forecast.host_bytes


def between(low, high, count):
    return [low + (high - low) * number / (count - 1) for number in range(count)]


@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_more_of_either_memory_keeps_what_fits(name, asked):
    least, most, host = bounds(MODELS[name])
    rows = []
    for device in between(least * 0.98, most, 7):
        rows.append([feasible(MODELS[name], asked, device, one) for one in between(host * 0.3, host * 0.95, 14)])
    for row in (*rows, *zip(*rows, strict=True)):
        assert list(row) == sorted(row), rows
    assert {True, False} <= {one for row in rows for one in row}


@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_what_fits_at_a_length_fits_at_a_shorter_one(name, asked):
    least, most, host = bounds(MODELS[name])
    device = least + 0.6 * (most - least)
    lengths = range(TOKENS // 2, TOKENS * 2, 1664)
    fitting = [feasible(MODELS[name], asked, device, 0.6 * host, tokens) for tokens in lengths]
    assert fitting == sorted(fitting, reverse=True), fitting
    assert {True, False} == set(fitting)
