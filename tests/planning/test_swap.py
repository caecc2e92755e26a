"""The linear program: against brute force over granules, within budgets, fast, and the same every time."""

import itertools
import random
import time
from dataclasses import replace

import pytest

from memo_runtime.config import make_settings
from memo_runtime.planning import cbc, swap
from memo_runtime.planning.freedom import lowest
from memo_runtime.planning.limits import Budgets, fits
from memo_runtime.planning.planner import make_plan
from memo_runtime.planning.rounding import granule
from memo_runtime.planning.sheet import KEEP, Choice, Sheet, lengths_of
from memo_runtime.planning.swap import solve_prefixes
from memo_runtime.planning.treatment import at_fraction
from memo_runtime.records import Executor, Growth, Link, ModelStates, Role
from memo_runtime.units import GiB
from tests.planning.builders import group, llama_block, llama_groups, llama_profile, on_cpu, profile_of

TOKENS = 1024


def toy_profile(*, slow_link=1.0, device_type="cuda", tail=False):
    """Two blocks of 8 granules before a kept one; a rerun costs about what a copy of the same rows does."""
    blocks = []
    for number, weight in enumerate((100, 160, 100)):
        groups = (
            group(Role.INPUT, 16, saved=not tail),
            group(Role.TOKEN, weight),
            group(Role.TOKEN, 40),
            group(Role.MIXER, 16),
        )
        blocks.append(
            replace(
                llama_block(number, tokens=TOKENS, groups=groups),
                forward_seconds=Growth(linear=1.0 / TOKENS),
                backward_seconds=Growth(linear=1.5 / TOKENS),
                rerun_seconds=Growth(linear=(0.5 + 0.2 * number) / TOKENS),
                forward_peak=Growth(),
                # A rerun of most rows takes more than backward does, of few rows less.
                backward_peak=Growth(linear=60),
                rerun_peak=Growth(constant=2000, linear=48),
                output=Growth(linear=16),
                gradients=30_000,
            )
        )
    rate = 140 * TOKENS / slow_link
    profile = profile_of(
        blocks,
        link=Link(to_host=rate, to_device=rate),
        outside_peak=Growth(),
        outside_forward=Growth(),
        outside_seconds=Growth(constant=0.3),
        shared=Growth(),
        states=ModelStates(parameters=10**5, buffers=0, gradients=100_000, optimizer=0),
        allocated_bytes=10**5,
    )
    return profile if device_type == "cuda" else on_cpu(profile, link=Link(to_host=rate, to_device=rate))


def sheet_of(profile):
    return Sheet(profile, lengths_of(profile, None))


def every_choice(device_rows):
    step = granule(TOKENS)
    counts = range(TOKENS // step + 1)
    pairs = [(a, d) for a in counts for d in counts if d <= a] if device_rows else [(a, 0) for a in counts]
    return [Choice(Executor.REPLAY, a * step, d * step) for a, d in pairs]


def brute_force(sheet, budgets, *, device_rows):
    """Seconds of the fastest plan over all granules of the first two blocks."""
    options = every_choice(device_rows)
    return min(
        (
            sheet.forecast((*pair, KEEP)).step_seconds
            for pair in itertools.product(options, repeat=2)
            if fits(sheet, budgets, (*pair, KEEP))
        ),
        default=None,
    )


def budgets_of(profile, device, host):
    return Budgets.of(sheet_of(profile), make_settings(budget=device, host_budget=host))


CASES = [
    pytest.param(slow, share, host, tail, id=f"link-{slow}-device-{share}-host-{host}-tail-{tail}")
    for slow, share, host, tail in [
        (0.5, 2.0, 10**9, False),
        (2.0, 0.5, 10**9, False),
        (2.0, 0.5, 200_000, False),
        (4.0, 0.7, 120_000, False),
        (4.0, 0.9, 10**9, True),
        (1.0, 0.6, 150_000, True),
        (3.0, 0.55, 90_000, False),
    ]
]


@pytest.mark.parametrize(("slow", "share", "host", "tail"), CASES)
@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_the_program_is_as_good_as_brute_force(slow, share, host, tail, device_type):
    profile = toy_profile(slow_link=slow, tail=tail, device_type=device_type)
    sheet = sheet_of(profile)
    base = at_fraction(sheet, 0.0, frozenset({2}))
    swapped = at_fraction(sheet, 1.0, frozenset({2}))
    everything = (KEEP,) * 3
    low, high = sheet.peak_bytes(base), max(sheet.peak_bytes(everything), sheet.peak_bytes(swapped))
    budgets = budgets_of(profile, low + int(share * (high - low)), host)
    best = brute_force(sheet, budgets, device_rows=True)
    settings = make_settings(policy="replay", keep_last=1, budget=budgets.device, host_budget=host)
    plan = make_plan(profile, settings)
    assert best is not None
    assert plan.forecast.peak_bytes <= budgets.device
    assert plan.forecast.host_bytes <= host
    # Rounding down costs at most the rerun of a granule in each block and the copies that it no longer hides.
    step = granule(TOKENS) / TOKENS
    assert best - 1e-9 <= plan.forecast.step_seconds <= best + step * (0.5 + 0.7) * 2


def test_device_rows_are_used_only_where_they_are_allowed():
    profile = toy_profile(slow_link=10.0)
    sheet = sheet_of(profile)
    budgets = budgets_of(profile, 200 * GiB, GiB)
    base = at_fraction(sheet, 0.0, frozenset({2}))
    free = solve_prefixes(sheet, budgets, base, device_rows=True)
    bound = solve_prefixes(sheet, budgets, base, device_rows=False)
    assert any(choice.device_rows for choice in free)
    assert not any(choice.device_rows for choice in bound)


def test_tensors_with_two_token_dimensions_are_moved_only_where_that_pays():
    scores = (*llama_groups(), group(Role.WHOLE, quadratic=32))
    blocks = [llama_block(number, tokens=8192, groups=scores) for number in range(4)]
    plan = make_plan(profile_of(blocks), make_settings(policy="replay", keep_last=1))
    assert plan.forecast.step_seconds <= min(
        make_plan(profile_of(blocks), make_settings(policy=policy, keep_last=1)).forecast.step_seconds
        for policy in ("swap", "recompute", "memo")
    )


@pytest.mark.parametrize("policy", ["auto", "replay"])
@pytest.mark.parametrize("budget", ["30GiB", "45GiB", "79GiB"])
def test_the_program_is_never_slower_than_one_fraction(policy, budget):
    profile = llama_profile(8, tokens=65536)
    settings = {"budget": budget, "host_budget": "40GiB"}
    free = make_plan(profile, make_settings(policy=policy, **settings)).forecast.step_seconds
    for other in ("swap", "recompute", "memo"):
        try:
            plan = make_plan(profile, make_settings(policy=other, **settings))
        except RuntimeError:
            continue
        assert free <= plan.forecast.step_seconds * (1 + 1e-3), other


@pytest.mark.parametrize("tokens", [16384, 65536, 131072])
def test_eighty_blocks_take_less_than_a_second(tokens):
    profile = llama_profile(80, tokens=tokens)
    make_plan(llama_profile(4), make_settings(policy="replay"))  # the solver is loaded
    start = time.process_time()
    make_plan(profile, make_settings(host_budget="300GiB"))
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("settings", [{}, {"budget": "50GiB"}, {"policy": "replay", "host_budget": "30GiB"}])
def test_the_same_question_gets_the_same_answer(settings):
    profile = llama_profile(12)
    assert make_plan(profile, make_settings(**settings)) == make_plan(profile, make_settings(**settings))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "No such file"),
        ("#!/bin/sh\nexit 1\n", "exit status 1"),
        ("#!/bin/sh\nexit 0\n", "No such file"),
        ("#!/bin/sh\nfor last; do :; done\n: > $last\n", "CBC answered ''"),
        ("#!/bin/sh\nfor last; do :; done\necho Optimal > $last\necho 0 what 1 >> $last\n", "CBC answered '0 what 1'"),
    ],
    ids=["missing", "failing", "silent", "empty", "confused"],
)
def test_a_failing_solver_leaves_a_simpler_plan(monkeypatch, caplog, tmp_path, script, said):
    program = tmp_path / "cbc"
    if script is not None:
        program.write_text(script)
        program.chmod(0o755)
    monkeypatch.setattr(cbc, "executable", lambda: str(program))
    plan = make_plan(llama_profile(6), make_settings(policy="replay"))
    assert {block.prefix for block in plan.blocks} <= {0, 131072}
    assert "the linear program was not solved, a simpler plan is used" in caplog.text
    assert said in caplog.text


@pytest.mark.parametrize("seed", range(12))
def test_programs_that_are_left_out_would_have_changed_nothing(monkeypatch, seed):
    """What bounds say is of no use is solved here all the same."""
    drawn = random.Random(seed)
    count, tokens = drawn.randint(2, 40), drawn.choice([8192, 65536, 131072])
    blocks = [
        llama_block(number, tokens=tokens, groups=llama_groups(mlp=4096 if number % 3 else 8192))
        for number in range(count)
    ]
    link = Link(to_host=10 ** drawn.uniform(9.5, 11), to_device=10 ** drawn.uniform(9.5, 11))
    profile = profile_of(blocks, link=link)
    kept = make_plan(profile, make_settings(policy="none", budget="100TiB"))
    device = kept.floor_bytes + int(drawn.uniform(0.02, 0.7) * (kept.forecast.peak_bytes - kept.floor_bytes))
    host = int(drawn.uniform(0.1, 1.0) * count * tokens * 90_000)
    settings = make_settings(policy=drawn.choice(["replay", "auto"]), budget=device, host_budget=host)
    solved = []
    monkeypatch.setattr(cbc, "_ask", lambda question, ask=cbc._ask: solved.append(question) or ask(question))
    plan = make_plan(profile, settings)
    few = len(solved)
    monkeypatch.setattr(swap, "_bound", lambda *_: float("-inf"))
    assert make_plan(profile, settings) == plan
    assert few <= len(solved) - few


class TestLowest:
    def test_few_counts_are_all_tried(self):
        values = {0: 3.0, 1: 2.0, 4: 1.0, 7: 5.0}
        assert lowest(list(values), values.__getitem__) == 4

    @pytest.mark.parametrize("best", [0, 3, 17, 41, 79])
    def test_many_counts_are_halved(self, best):
        tried = []

        def value(count):
            tried.append(count)
            return abs(count - best)

        assert abs(lowest(range(80), value) - best) <= 5
        assert len(tried) <= 9

    def test_of_equals_the_first_wins(self):
        assert lowest(range(4), lambda count: 1.0) == 0


def test_without_pulp_a_simpler_plan_is_used_and_that_is_said(monkeypatch, caplog):
    monkeypatch.setattr(swap, "find_spec", lambda name: None)
    swap._pulp_is_installed.cache_clear()
    with caplog.at_level("WARNING", logger="memo_runtime"):
        plan = make_plan(llama_profile(), make_settings(policy="auto", budget=60 * GiB, host_budget=60 * GiB))
    swap._pulp_is_installed.cache_clear()
    assert plan.forecast.peak_bytes <= 60 * GiB
    assert "PuLP is not installed" in caplog.text
    assert plan.forecast.host_bytes <= plan.limits.host_bytes
