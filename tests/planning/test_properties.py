"""Any profile, any settings: a plan within both budgets that the plain reference agrees with, or an error."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memo_runtime.config import make_settings
from memo_runtime.errors import HostLimitError, PlanInfeasibleError
from memo_runtime.planning.planner import make_plan
from memo_runtime.planning.rounding import granule
from memo_runtime.planning.sheet import Sheet, lengths_of
from memo_runtime.planning.treatment import at_fraction
from memo_runtime.records import Action, Executor, Growth, Link, ModelStates, Role
from tests.planning import reference
from tests.planning.builders import group, llama_block, on_cpu, profile_of
from tests.planning.test_infeasible import suggestions

SIZES = st.integers(0, 4000)


@st.composite
def groups(draw):
    role = draw(st.sampled_from(list(Role)))
    saved = draw(st.booleans()) or role in (Role.TOKEN, Role.FIXED)
    if role in (Role.FIXED, Role.PARAMETER, Role.SHARED):
        return group(role, constant=draw(SIZES), saved=saved)
    if role is Role.WHOLE:
        return group(role, quadratic=draw(st.integers(0, 3)), saved=saved, estimated=draw(st.booleans()))
    multiple = draw(st.sampled_from([1, 1, 1, 32]))
    return group(role, draw(SIZES), saved=saved, multiple=multiple)


@st.composite
def blocks(draw, number, groups_of_block):
    kind = draw(st.sampled_from(["sliceable", "sliceable", "replayable", "opaque"]))
    return llama_block(
        number,
        tokens=0,
        groups=groups_of_block,
        sliceable=kind == "sliceable",
        replayable=kind != "opaque",
        reason="" if kind == "sliceable" else "it cannot be sliced",
        forward_seconds=Growth(linear=draw(st.floats(1e-7, 1e-4))),
        backward_seconds=Growth(linear=draw(st.floats(1e-7, 1e-4))),
        rerun_seconds=Growth(constant=draw(st.floats(0, 1e-3)), linear=draw(st.floats(0, 1e-4))),
        forward_peak=Growth(linear=draw(SIZES)),
        backward_peak=Growth(linear=draw(SIZES)),
        rerun_peak=Growth(constant=draw(SIZES), linear=draw(SIZES)),
        output=Growth(linear=draw(SIZES)),
        gradients=draw(st.integers(0, 2 * 10**7)),
    )


@st.composite
def profiles(draw):
    shapes = draw(st.lists(st.lists(groups(), min_size=1, max_size=6), min_size=1, max_size=2))
    count = draw(st.integers(1, 5))
    tokens = draw(st.sampled_from([1, 2, 9, 17, 100, 1000, 1024, 5000, 20000]))
    chosen = []
    for number in range(count):
        shape = tuple(draw(st.sampled_from(shapes)))
        block = draw(blocks(number, shape))
        chosen.append(type(block)(**{**_fields(block), "tokens": tokens}))
    gradients = sum(block.gradients for block in chosen) + draw(st.integers(0, 2 * 10**7))
    present = draw(st.sampled_from([0, 0, gradients // 3, gradients]))
    outside = draw(SIZES)
    profile = profile_of(
        chosen,
        states=ModelStates(
            parameters=10**5, buffers=100, gradients=gradients, optimizer=2 * 10**5, gradients_present=present,
            stepping=draw(st.sampled_from([0, 0, 10**5, 10**8])),
        ),
        allocated_bytes=10**5 + present,
        outside_forward=Growth(linear=outside),
        entry=Growth(linear=draw(st.sampled_from([0, outside]))),
        outside_peak=Growth(linear=draw(SIZES)),
        result=Growth(linear=draw(SIZES)),
        link=Link(to_host=draw(st.floats(1e6, 1e12)), to_device=draw(st.floats(1e6, 1e12))),
    )
    return on_cpu(profile, link=profile.link) if draw(st.booleans()) else profile


def _fields(block):
    return {name: getattr(block, name) for name in block.__dataclass_fields__}


@st.composite
def requests(draw):
    policy = draw(st.sampled_from(["none", "swap", "recompute", "memo", "replay", "auto", "auto", "replay"]))
    asked = {"policy": policy}
    if policy in ("memo", "replay") and draw(st.booleans()):
        asked["alpha"] = draw(st.floats(0, 1))
    if draw(st.booleans()):
        asked["accumulating"] = True
    if draw(st.booleans()):
        asked["keep_last"] = draw(st.integers(0, 1))
    return asked


def settings_of(**asked):
    """Settings with budgets to the byte: a bare number of a few bytes would be taken for a forgotten unit."""
    asked.pop("accumulating", None)
    sizes = {name: f"{asked[name]}B" for name in ("budget", "host_budget") if isinstance(asked.get(name), int)}
    return make_settings(**{**asked, **sizes})


def budgets_for(profile, draw):
    """Budgets around what matters: between the floor and everything kept, between nothing and all moved."""
    most = settings_of(policy="none", budget=10**18)
    everything = make_plan(profile, most)
    floor, peak = everything.floor_bytes, everything.forecast.peak_bytes
    moved = sum(one.size.at(block.tokens) for block in profile.blocks for one in block.groups)
    share = st.sampled_from([0.0, 0.03, 0.1, 0.25, 0.4, 0.6, 0.8, 1.0, 1.5, 3.0])
    return {
        "budget": int(floor * 0.95 + draw(share) * max(abs(peak - floor), floor * 0.1)),
        "host_budget": int(draw(share) * moved) + draw(st.integers(0, 200)),
    }


FAST = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@FAST
@given(profiles(), requests(), st.data())
def test_a_plan_keeps_both_budgets_or_its_refusal_helps(profile, asked, data):
    accumulating = asked.get("accumulating", False)
    asked = {**asked, **budgets_for(profile, data.draw)}
    try:
        plan = make_plan(profile, settings_of(**asked), accumulating=accumulating)
    except PlanInfeasibleError as error:
        check_suggestions(profile, asked, str(error))
        return
    assert plan.forecast.peak_bytes <= asked["budget"]
    assert plan.forecast.host_bytes <= asked["host_budget"]
    check_plan(profile, plan)
    check_the_other_kind_of_step(profile, asked, plan)


def check_the_other_kind_of_step(profile, asked, plan):
    """A plan of fresh steps says whether accumulation would be refused; one for accumulation fits fresh steps too."""
    if plan.accumulating or profile.device_type == "cpu":
        make_plan(profile, settings_of(**asked), accumulating=False)
        return
    refused = any("steps that start with gradients do not fit" in note for note in plan.notes)
    try:
        make_plan(profile, settings_of(**asked), accumulating=True)
    except PlanInfeasibleError as error:
        refusal = error
        helps = isinstance(refusal, HostLimitError) or "zero_grad(set_to_none=True) before each" in str(refusal)
    else:
        refusal, helps = None, True
    assert refused == (refusal is not None)
    assert helps, refusal


def check_plan(profile, plan):
    stash, peak = reference.peaks(profile, plan.blocks, plan.accumulating)
    assert (plan.forecast.stash_peak_bytes, plan.forecast.peak_bytes) == (stash, peak)
    assert plan.forecast.host_bytes == reference.host_bytes(profile, plan.blocks)
    for block, planned in zip(profile.blocks, plan.blocks, strict=True):
        tokens = planned.tokens
        assert 0 <= planned.device_rows <= planned.prefix <= tokens
        assert planned.prefix in (0, tokens) or planned.prefix % granule(tokens) == 0
        assert tokens - planned.prefix != 1 or planned.prefix == 0
        if planned.executor is Executor.REPLAY and 0 < planned.prefix < tokens:
            assert block.sliceable
        if planned.executor is Executor.REPLAY and planned.prefix < tokens:
            assert block.sliceable or block.replayable
        for one, action in zip(block.groups, planned.actions, strict=True):
            if action in (Action.PREFIX, Action.TAIL):
                assert one.splits


def check_suggestions(profile, asked, text):
    if "would fit  no" in text:
        return
    for change, tokens in suggestions(text):
        again = {**asked, **change}
        if "policy" in change and "alpha" not in change:
            again.pop("alpha", None)
        accumulating = asked.get("accumulating", False)
        make_plan(profile, settings_of(**again), tokens={0: tokens} if tokens else None, accumulating=accumulating)


@settings(max_examples=25, deadline=None)
@given(profiles(), requests())
def test_planning_is_deterministic(profile, asked):
    first = make_plan(profile, settings_of(budget=10**12, host_budget=10**12, **asked))
    assert make_plan(profile, settings_of(budget=10**12, host_budget=10**12, **asked)) == first


@settings(max_examples=40, deadline=None)
@given(profiles(), st.floats(0, 1), st.booleans())
def test_what_is_there_at_the_head_is_never_more_than_the_peak(profile, alpha, accumulating):
    """Plans are refused by it before they are walked through."""
    sheet = Sheet(profile, lengths_of(profile, None), accumulating=accumulating)
    for kept in range(len(profile.blocks) + 1):
        choices = at_fraction(sheet, alpha, frozenset(range(len(profile.blocks) - kept, len(profile.blocks))))
        assert sheet.bytes_at_head(choices) <= sheet.peak_bytes(choices)


@pytest.mark.parametrize("policy", ["none", "swap", "recompute", "memo", "replay", "auto"])
def test_budgets_that_are_exactly_enough_are_enough(policy):
    profile = profile_of([llama_block(number, tokens=8192) for number in range(5)])
    first = make_plan(profile, settings_of(policy=policy, budget="20GiB" if policy == "none" else "12GiB")).forecast
    exact = settings_of(policy=policy, budget=first.peak_bytes, host_budget=first.host_bytes)
    if policy in ("none", "swap", "recompute"):
        assert make_plan(profile, exact).forecast == first
    else:
        again = make_plan(profile, exact).forecast
        assert (again.peak_bytes, again.host_bytes) <= (first.peak_bytes, first.host_bytes)
