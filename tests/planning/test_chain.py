"""Of how many blocks one stashes its input: taken where host or device memory asks for it, and only there."""

import random
import time
from dataclasses import replace

import pytest

from memo_runtime.config import make_settings
from memo_runtime.errors import HostLimitError
from memo_runtime.persist import load_plan, save
from memo_runtime.planning.chain import longest_chain
from memo_runtime.planning.limits import Budgets, fits
from memo_runtime.planning.planner import make_plan
from memo_runtime.planning.policies import strategy_for
from memo_runtime.planning.sheet import Sheet, lengths_of
from memo_runtime.planning.suggest import is_feasible
from memo_runtime.planning.tiles import _likely
from memo_runtime.planning.tiles import by_tiles as choices_by_tiles
from memo_runtime.records import Growth, Moment
from memo_runtime.soundness import find_deviation, find_fault
from memo_runtime.units import GiB
from tests.planning.builders import llama_profile
from tests.planning.test_executors import ROW, by_tiles

TOKENS = 1 << 20


def chained(count=16, tokens=TOKENS):
    takes = replace(
        by_tiles()["tiled"], result=(Moment(full=Growth(linear=ROW), tile=Growth(linear=10 * ROW)),),
        result_flops=Growth(linear=2 * 2048 * (2048 + 3 * 8192)), chained=True,
    )  # fmt: skip
    profile = llama_profile(count, tokens=tokens)
    blocks = [replace(block, tiled=replace(takes, chained=number > 0)) for number, block in enumerate(profile.blocks)]
    return replace(profile, blocks=tuple(blocks))


def plan(profile, **settings):
    return make_plan(profile, make_settings(policy="tiled", **settings))


def inputs(planned):
    """Blocks that make theirs again."""
    return sum(block.from_below for block in planned.blocks)


def test_a_million_tokens_within_118_gib_of_host_memory():
    """Inputs and results of attention are 128 GiB; without eight of the inputs they fit."""
    profile = chained()
    whole = plan(profile, budget="79GiB", host_budget="200GiB", keep_last=0, alpha=0.0)
    assert inputs(whole) == 0
    assert whole.forecast.host_bytes > 118 * GiB
    some = plan(profile, budget="79GiB", host_budget="118GiB", keep_last=0, alpha=0.0)
    assert inputs(some) == 8
    assert some.forecast.host_bytes <= 118 * GiB
    assert whole.forecast.host_bytes - some.forecast.host_bytes == 8 * ROW * TOKENS
    assert 0 < some.forecast.step_seconds - whole.forecast.step_seconds < 0.02 * whole.forecast.step_seconds
    assert "inputs made again from the block below: 8, of model.layers.1 ... model.layers.15" in str(some)
    fewer = plan(profile, budget="79GiB", host_budget="90GiB", keep_last=0, alpha=0.0)
    assert inputs(fewer) == 12


def test_a_run_is_on_the_device_as_a_whole():
    """Two: one more tensor lands. Four: those of the block below, of two more their results, and two inputs made."""
    profile = chained()
    plans = [plan(profile, budget="79GiB", host_budget=f"{host}GiB", keep_last=0, alpha=0.0) for host in (200, 118, 90)]
    peaks = [one.forecast.peak_bytes for one in plans]
    row = ROW * TOKENS
    more = [peak - peaks[0] for peak in peaks]
    assert 0 <= more[1] <= row + 64 * TOKENS
    assert more[1] < more[2] <= 5 * row + 3 * 64 * TOKENS


def test_beyond_that_blocks_are_late():
    """Nothing lands ahead, and a run is as long as it must be; where something else fits it is not taken."""
    profile = chained()
    limits = {"budget": "79GiB", "keep_last": 0, "alpha": 0.0}
    early = plan(profile, **limits, host_budget="90GiB")
    assert not any(block.late for block in early.blocks)
    late = plan(profile, budget="52GiB", keep_last=0, alpha=0.0, host_budget="74GiB")
    assert all(block.late for block in late.blocks)
    assert inputs(late) == 14
    assert [block.passes for block in late.blocks] == [7, 6, 5, 4, 3, 2, 1, 0] * 2
    assert late.forecast.peak_bytes <= 52 * GiB
    assert late.forecast.bytes_to_device > late.forecast.bytes_to_host
    assert any("memory is short" in note for note in late.notes)
    assert find_fault(late) is None
    assert find_deviation(late) is None
    blocks = (replace(late.blocks[0], passes=1), *late.blocks[1:])
    fault = find_fault(replace(late, blocks=blocks))
    assert fault is not None
    assert (fault.where, fault.expected) == ("blocks[0].passes", "7, the blocks above it in its run")
    blocks = (*late.blocks[:3], replace(late.blocks[3], late=False, passes=0), *late.blocks[4:])
    assert "only one is late" in find_fault(replace(late, blocks=blocks)).expected


@pytest.mark.parametrize("wanted", [{}, {"keep_last": 2}, {"alpha": 0.3}, {"alpha": 0.3, "keep_last": 0}], ids=str)
def test_what_is_said_to_fit_is_planned_and_nothing_else(wanted):
    """Whether something fits is asked of what needs least; whole plans, of everything that there is."""
    profile = chained(5, tokens=1 << 18)
    answers = set()
    for device in (9, 10, 12, 14, 18, 24, 40):
        for host in (0, 2, 4, 8, 16):
            limits = {"budget": f"{device}GiB", "host_budget": f"{host}GiB"}
            settings = make_settings(policy="tiled", **limits, **wanted)
            sheet = Sheet(profile, lengths_of(profile, None))
            budgets, (strategy, _) = Budgets.of(sheet, settings), strategy_for(settings, Budgets.of(sheet, settings))
            stands = any(fits(sheet, budgets, one) for one in strategy.stand_bys(sheet))
            found = strategy.decide(sheet, budgets)
            assert is_feasible(sheet, settings) == (found is not None)
            assert found is not None or not stands
            answers.add(found is not None)
    assert answers == {True, False}


def test_what_nothing_hands_on_is_never_left_out():
    profile = chained()
    blocks = (replace(one, tiled=replace(one.tiled, chained=False)) for one in profile.blocks)
    apart = replace(profile, blocks=tuple(blocks))
    assert longest_chain(profile.blocks) == 16
    assert longest_chain(apart.blocks) == 1
    with pytest.raises(HostLimitError):
        plan(apart, budget="79GiB", host_budget="118GiB", keep_last=0)


@pytest.mark.parametrize(
    ("index", "change", "expected"),
    [
        (1, {"from_below": False}, "the block above does not say from_below"),
        (0, {"for_above": False}, "the block below does not say for_above"),
        (15, {"for_above": True}, "the block above does not say from_below"),
        (0, {"device_rows": TOKENS, "sent": 0}, "stays on the device, and that of this one does not"),
        (1, {"bytes_to_host": 0}, None),
    ],
)
def test_plan_files_with_inputs_that_nobody_makes(index, change, expected, tmp_path):
    planned = plan(chained(), budget="79GiB", host_budget="118GiB", keep_last=0)
    path = tmp_path / "plan.json"
    save(planned, path)
    assert load_plan(path) == planned
    blocks = list(planned.blocks)
    blocks[index] = replace(blocks[index], **change)
    wrong = replace(planned, blocks=tuple(blocks))
    fault = find_fault(wrong) or find_deviation(wrong)
    assert fault is not None
    assert (expected or "which follows from the profile") in fault.expected


@pytest.mark.slow
def test_eighty_blocks_are_planned_at_once():
    profile = chained(80, tokens=131072)
    began = time.perf_counter()
    plan(profile, budget="60GiB", host_budget="60GiB")
    assert time.perf_counter() - began < 30


@pytest.mark.parametrize("seed", range(6))
def test_numbers_of_stashes_that_are_not_looked_at_would_not_fit(seed):
    """Every number is looked at here, for budgets between the least and the most of some number."""
    drawn = random.Random(seed)
    sheet = Sheet(chained(drawn.choice([5, 16])), ())
    sheet = sheet.at(tuple(block.tokens for block in sheet.blocks))
    how = {
        "groups": 1, "every": drawn.choice([1, 4]), "late": drawn.random() < 0.5, "sent": drawn.choice([0.0, 0.25]),
    }  # fmt: skip
    if how["late"]:
        how["sent"] = 0.0
    alpha, residents = drawn.choice([0.0, 0.1]), list(range(len(sheet.blocks), -1, -1))

    def at(resident):
        return choices_by_tiles(sheet, alpha, resident, 8192, **how)

    device, host = ([size(at(one)) for one in residents] for size in (sheet.peak_bytes, sheet.host_bytes))
    found = 0
    for _ in range(30):
        settings = make_settings(
            policy="tiled", budget=f"{drawn.randint(min(device), max(device))}B",
            host_budget=f"{drawn.randint(min(host), max(host))}B",
        )  # fmt: skip
        budgets = Budgets.of(sheet, settings)
        fitting = [one for one in residents if fits(sheet, budgets, at(one))]
        likely = list(_likely(sheet, budgets, residents, at))
        assert set(fitting) <= set(likely)
        found += len(likely) < len(residents) and bool(fitting)
    assert found
