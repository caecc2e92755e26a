"""Refusals: by how much, why, and what would fit, which is then planned here once more."""

import re
from dataclasses import replace

import pytest

from memo_runtime.config import make_settings
from memo_runtime.errors import HostLimitError, PlanInfeasibleError
from memo_runtime.planning.planner import make_plan
from memo_runtime.planning.words import PYTHON, CommandWords, size_at_least
from memo_runtime.records import Role
from memo_runtime.units import GiB, parse_bytes
from tests.planning.builders import group, llama_block, llama_profile, on_cpu, opaque, profile_of
from tests.planning.test_monotone import MODELS

PROFILE = llama_profile(12)


def refused(profile=PROFILE, error=PlanInfeasibleError, tokens=None, **settings):
    with pytest.raises(error) as caught:
        make_plan(profile, make_settings(**settings), tokens=tokens)
    assert type(caught.value) is error
    return str(caught.value)


def suggestions(text):
    """(settings to change, tokens) of every suggestion in an error."""
    block = text.split("would fit")[1]
    for line in block.strip().splitlines():
        words = re.sub(r"\(device .*", "", line)
        tokens = re.search(r"([\d,]+) tokens instead", words)
        knobs = dict(re.findall(r"(\w+)='([^']*)'", words))
        numbers = {name: float(value) for name, value in re.findall(r"(alpha|keep_last)=([\d.]+)", words)}
        if "keep_last" in numbers:
            numbers["keep_last"] = int(numbers["keep_last"])
        left_out = dict.fromkeys(re.findall(r"(?:without|and) (alpha|tile)", words))
        yield {**knobs, **numbers, **left_out}, int(tokens[1].replace(",", "")) if tokens else None


def assert_suggestions_fit(text, profile=PROFILE, **settings):
    found = list(suggestions(text))
    assert found
    for change, tokens in found:
        make_plan(profile, make_settings(**{**settings, **change}), tokens={0: tokens} if tokens else None)


REQUESTS = [
    {"policy": "none"},
    {"policy": "swap", "budget": "30GiB"},
    {"policy": "memo", "alpha": 0.5, "budget": "30GiB"},
    {"policy": "memo", "budget": "20GiB"},
    {"policy": "replay", "budget": "25GiB"},
    {"policy": "replay", "alpha": 1.0, "budget": "25GiB"},
    {"policy": "recompute", "budget": "25GiB"},
    {"budget": "20GiB"},
    {"budget": "20GiB", "host_budget": "10GiB"},
    {"budget": "25GiB", "keep_last": 4},
    {"policy": "recompute", "budget": "20GiB", "strict": True},
]


@pytest.mark.parametrize("settings", REQUESTS, ids=str)
def test_a_device_refusal_suggests_only_what_fits(settings):
    text = refused(**settings)
    assert re.match(r"this step does not fit in [\d.]+ GiB on H100 .*: it needs .* short by [\d.]+ GiB\n", text)
    assert "floor" in text
    assert_suggestions_fit(text, **settings)


HOST_REQUESTS = [
    {"policy": "swap", "host_budget": "40GiB"},
    {"policy": "memo", "alpha": 0.9, "host_budget": "40GiB"},
    {"policy": "memo", "host_budget": "5GiB"},
    {"policy": "replay", "alpha": 0.9, "host_budget": "40GiB"},
    {"policy": "replay", "host_budget": "5GiB"},
    {"policy": "recompute", "host_budget": "5GiB"},
    {"budget": "30GiB", "host_budget": "5GiB"},
]


@pytest.mark.parametrize("settings", HOST_REQUESTS, ids=str)
def test_a_host_refusal_suggests_only_what_fits(settings):
    text = refused(error=HostLimitError, **settings)
    assert re.match(r"this step needs [\d.]+ GiB of host memory .* allowed \(host_budget\): short by", text)
    assert_suggestions_fit(text, **settings)


@pytest.mark.parametrize("settings", [*REQUESTS, *HOST_REQUESTS], ids=str)
def test_the_longest_length_fits_and_a_granule_more_does_not(settings):
    error = HostLimitError if settings in HOST_REQUESTS else PlanInfeasibleError
    text = refused(error=error, **settings)
    longest = next((tokens for _, tokens in suggestions(text) if tokens), 0)
    if longest:
        make_plan(PROFILE, make_settings(**settings), tokens={0: longest})
    refused(tokens={0: longest + 128}, error=error, **settings)


def test_the_largest_fraction_fits_and_the_next_does_not():
    text = refused(error=HostLimitError, policy="swap", host_budget="40GiB")
    alpha = next(change["alpha"] for change, _ in suggestions(text) if "alpha" in change)
    make_plan(PROFILE, make_settings(policy="memo", alpha=alpha, host_budget="40GiB"))
    refused(error=HostLimitError, policy="memo", alpha=alpha + 0.001, host_budget="40GiB")


def test_a_slightly_smaller_budget_than_the_suggested_one_does_not_fit():
    text = refused(policy="swap", budget="30GiB")
    budget = next(change["budget"] for change, _ in suggestions(text) if "budget" in change)
    refused(policy="swap", budget=parse_bytes(budget) - GiB // 50)


def test_the_floor_names_its_parts_and_they_add_up():
    text = refused(policy="swap", budget="30GiB")
    line = next(line for line in text.splitlines() if line.startswith("  floor"))
    total, parts = line.split(" with every activation sent away or rebuilt: ")
    assert "optimizer (AdamW, assumed)" in parts
    sizes = [parse_bytes(size) for size in re.findall(r"([\d.]+ [KMG]iB)", parts)]
    assert sum(sizes) == pytest.approx(parse_bytes(total.split("floor")[1].strip()), rel=1e-2)


def test_a_model_that_is_too_big_by_itself_is_told_so():
    settings = {"policy": "recompute", "budget": "1GiB", "host_budget": "1GiB"}
    text = refused(**settings)
    assert "no length" in text
    assert "; a smaller model or fewer trained weights or a smaller optimizer state would" in text
    profile = llama_profile(12)
    frozen = replace(profile.states, gradients=10**6, optimizer=2 * 10**6)
    assert "; a smaller model would" in refused(replace(profile, states=frozen), **settings)


def test_the_place_is_named():
    assert "model.layers.11, backward" in refused(policy="swap", budget="30GiB")
    assert "head and loss" in refused(policy="none")


def test_detected_limits_are_named():
    small = llama_profile(12, host_bytes=GiB)
    assert "(cgroup v2)" in refused(small, error=HostLimitError, policy="swap")
    assert "(memory of H100, less " in refused(policy="none")


def test_a_host_budget_above_the_detected_one_is_obeyed():
    small = llama_profile(12, host_bytes=GiB)
    planned = make_plan(small, make_settings(policy="swap", host_budget="900GiB"))
    assert planned.forecast.host_bytes > GiB


def test_on_cpu_without_a_budget_only_the_host_refuses():
    profile = on_cpu(PROFILE, host_bytes=10 * GiB)
    assert "cgroup v2" in refused(profile, error=HostLimitError, policy="swap")
    make_plan(profile, make_settings(policy="none"))


def test_auto_on_cpu_keeps_what_the_host_does_not_take():
    profile = on_cpu(PROFILE)
    for host, moved in (("1GiB", 0), ("5GiB", 4), ("200GiB", 10)):
        plan = make_plan(profile, make_settings(host_budget=host))
        assert sum(block.executor != "keep" for block in plan.blocks) == moved
        assert plan.forecast.host_bytes <= parse_bytes(host)
        assert any("stay on the device" in note for note in plan.notes) == (moved < 10)
    assert "keep_last=8" in refused(profile, error=HostLimitError, host_budget="5GiB", keep_last=2)


def test_a_host_refusal_names_the_device_budget_that_causes_it_and_the_one_that_would_do():
    larger = llama_profile(12, device_bytes=140 * GiB)
    text = refused(larger, error=HostLimitError, budget="30GiB", host_budget="5GiB")
    assert "with policy 'auto' to fit in 30.00 GiB on the device (budget), and 5.00 GiB are allowed" in text
    budget = next(change["budget"] for change, _ in suggestions(text) if "budget" in change)
    assert make_plan(larger, make_settings(budget=budget, host_budget="5GiB")).forecast.host_bytes <= 5 * GiB


def test_no_budget_is_suggested_that_the_device_does_not_have():
    # Of the 79 GiB of this device; keeping more there would need 102 GiB.
    text = refused(error=HostLimitError, budget="30GiB", host_budget="5GiB")
    assert "host_budget='" in text
    assert "\n             budget='" not in text
    small = llama_profile(12, device_bytes=2 * GiB)
    assert "budget='" not in refused(small)
    assert "would fit  no length" in refused(small)


def test_the_fewest_blocks_that_must_stay_are_suggested():
    settings = {"policy": "memo", "alpha": 0.9, "host_budget": "40GiB"}
    profile = llama_profile(12, device_bytes=1000 * GiB)
    text = refused(profile, error=HostLimitError, **settings)
    kept = next(change["keep_last"] for change, _ in suggestions(text) if "keep_last" in change)
    make_plan(profile, make_settings(**settings, keep_last=kept))
    refused(profile, error=HostLimitError, **settings, keep_last=kept - 1)


def test_suggestions_under_strict_do_not_fall_back():
    blocks = [opaque(llama_block(i)) for i in range(6)]
    text = refused(profile_of(blocks), policy="swap", budget="30GiB", strict=True)
    assert "policy='recompute'" not in text


def test_stacks_are_shortened_together():
    blocks = [llama_block(i, stack=i // 4, tokens=131072 // (1 + i // 4)) for i in range(8)]
    text = refused(profile_of(blocks), policy="swap", budget="25GiB")
    longest = next(tokens for _, tokens in suggestions(text) if tokens)
    assert "tokens instead of 131,072, shorter sequences in proportion (device" in text
    tokens = {0: longest, 1: longest // 2}
    settings = make_settings(policy="swap", budget="25GiB")
    found = make_plan(profile_of(blocks), settings, tokens=tokens)
    followed = make_plan(profile_of(blocks), settings, longest=longest)
    assert replace(followed, notes=found.notes) == found


def test_what_does_not_go_with_another_policy_is_part_of_the_change():
    settings = {"policy": "replay", "alpha": 1.0, "budget": "25GiB"}
    assert "policy='auto' without alpha (device" in refused(**settings)
    with pytest.raises(PlanInfeasibleError, match=r"--policy auto without --alpha \(device"):
        make_plan(PROFILE, make_settings(**settings), words=CommandWords(1))
    assert PYTHON.without("policy='auto'", "alpha", "tile") == "policy='auto' without alpha and tile"
    assert "without" not in refused(policy="replay", budget="25GiB")


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 10**6, 2**30 - 1, 2**30, 2**30 + 1, 123456789012, 10**14])
def test_a_size_in_words_is_no_smaller(size):
    assert size <= parse_bytes(size_at_least(size)) <= size * 1.01 + 11


def test_a_host_budget_of_a_few_bytes_is_suggested_with_its_unit():
    # A bare number of a few bytes is refused: it is taken for a forgotten unit.
    profile = on_cpu(profile_of([opaque(llama_block(tokens=17, groups=(group(Role.INPUT, 10, saved=False),)))]))
    settings = {"policy": "recompute", "keep_last": 0, "host_budget": "0B"}
    text = refused(profile, error=HostLimitError, **settings)
    assert "host_budget='192B'" in text
    assert_suggestions_fit(text, profile, **settings)


BOTH_BIND = [
    ({"policy": "replay", "host_budget": "1GiB"}, "host_budget"),
    ({"policy": "auto", "keep_last": 3, "host_budget": "1GiB"}, "host_budget"),
    ({"policy": "memo", "host_budget": "100GiB", "budget": "9GiB"}, "budget"),
]


@pytest.mark.parametrize(("settings", "knob"), BOTH_BIND, ids=str)
def test_what_a_step_needs_is_enough_and_a_little_less_is_not(settings, knob):
    """Also where a prefix of some blocks, or whole ones, take less than all stand-bys do."""
    error = HostLimitError if knob == "host_budget" else PlanInfeasibleError
    profile = MODELS["small"]
    text = refused(profile, error=error, **settings)
    needed = parse_bytes(re.search(r"needs ([\d.]+ GiB)", text)[1])
    make_plan(profile, make_settings(**{**settings, knob: needed + GiB // 50}))
    refused(profile, error=error, **{**settings, knob: needed - GiB // 50})
    suggested = next(change[knob] for change, _ in suggestions(text) if knob in change)
    assert abs(parse_bytes(suggested) - needed) <= GiB // 50
    assert_suggestions_fit(text, profile, **settings)
