"""The walk through a step and the seconds, on numbers that can be checked by hand."""

import random
from dataclasses import replace

import pytest

from memo_runtime.config import make_settings
from memo_runtime.errors import PlanInfeasibleError
from memo_runtime.planning.actions import plan_block
from memo_runtime.planning.footprint import Footprint, footprint
from memo_runtime.planning.forecast import Surroundings, allowance, run_course
from memo_runtime.planning.planner import make_plan
from memo_runtime.records import Executor, Growth, Link, ModelStates, Role, Stretch
from tests.planning import reference
from tests.planning.builders import group, llama_block, llama_profile, on_cpu, profile_of

TOKENS = 4096


def small_block(number, **changes):
    """100 bytes per token of tokens, 10 of input, 10 of mixer; 2 s forward, 4 s backward, 1 s rerun."""
    groups = (
        group(Role.PARAMETER, constant=9999),
        group(Role.INPUT, 10),
        group(Role.TOKEN, 100),
        group(Role.MIXER, 10),
    )
    block = llama_block(number, tokens=TOKENS, groups=groups)
    return replace(
        block,
        forward_seconds=Growth(constant=2.0),
        backward_seconds=Growth(constant=4.0),
        rerun_seconds=Growth(linear=1 / TOKENS),
        forward_peak=Growth(constant=7),
        backward_peak=Growth(constant=11),
        rerun_peak=Growth(constant=2),
        output=Growth(constant=3),
        gradients=200,
        **changes,
    )


def small_profile(count=3, **changes):
    states = ModelStates(
        parameters=1000,
        buffers=10,
        gradients=1000,
        optimizer=2000,
        gradients_present=300,
        optimizer_present=500,
    )
    return profile_of(
        [small_block(number) for number in range(count)],
        **{
            "states": states,
            "allocated_bytes": 5000,
            "shared": Growth(constant=50),
            "outside_forward": Growth(constant=60),
            "outside_peak": Growth(constant=70),
            "outside_seconds": Growth(constant=3.0),
            "link": Link(to_host=120 * TOKENS, to_device=120 * TOKENS),
            **changes,
        },
    )


def forecast_of(profile, **settings):
    return make_plan(profile, make_settings(**settings)).forecast


#: Eight rows of the widest tensor that splits, and two small blocks of the allocator; no tensor has 1 MiB.
ALLOWED = 8 * 100 + 1024
#: Without gradients: 300 of 1000 were there, 600 are the blocks'.
BASE = 5000 - 300 + 1500 + 50 + 60 + ALLOWED


def test_what_an_allocator_may_add_is_allowed_for_and_little():
    profile = llama_profile(4, tokens=65536)
    large = 13  # all but what has 4 bytes a token and what has 64 in all
    widest = max(round(group.size.linear) for group in profile.blocks[0].groups)
    assert allowance(profile, 65536) == large * 2**20 + 8 * widest + 1024
    # Expandable segments split everything, and on CPU nothing is allocated in blocks.
    assert allowance(replace(profile, expandable=True), 65536) == 8 * widest + 1024
    assert allowance(profile, 65536) < 0.002 * forecast_of(profile, policy="recompute").peak_bytes
    cpu = on_cpu(profile)
    stash = forecast_of(cpu, policy="swap", keep_last=0).stash_peak_bytes
    states = cpu.states
    fixed = states.parameters + states.buffers + states.gradients + states.optimizer
    assert forecast_of(cpu, policy="swap", keep_last=0).peak_bytes == fixed + stash


def test_everything_kept():
    forecast = forecast_of(small_profile(), policy="none")
    assert forecast.stash_peak_bytes == 3 * 120 * TOKENS
    # Head and loss need more than a block's backward does: 70 beyond 11, both with the 400 outside the blocks. The
    # first block keeps its input, 10 of the 120, which was there before.
    assert forecast.peak_bytes == BASE + (3 * 120 - 10) * TOKENS + 400 + 70
    assert forecast.step_seconds == 3 * 6 + 3
    assert forecast.bytes_to_host == forecast.host_bytes == forecast.recomputed_flops == 0


def test_everything_swapped_holds_two_blocks():
    forecast = forecast_of(small_profile(), policy="swap", keep_last=0)
    # Forward: the block's own bytes beside the copies of the block before; backward: full beside landing.
    assert forecast.stash_peak_bytes == 2 * 120 * TOKENS
    # The second block has the gradients of the third beside it; its own are within the 11.
    assert forecast.peak_bytes == BASE + 2 * 120 * TOKENS + 400 + 200 + 11
    assert forecast.bytes_to_host == forecast.bytes_to_device == 3 * 120 * TOKENS
    # One second per copy: hidden by 2 s forward and 4 s backward, but nothing hides those of the last block.
    assert forecast.step_seconds == 3 * 6 + 3 + 2


def test_everything_rebuilt_holds_one_block_and_what_lands_comes_when_most_of_it_is_gone():
    forecast = forecast_of(small_profile(), policy="recompute", keep_last=0)
    # Backward: 120, and 20 to land when 90 are freed. Forward: 120 beside 20 on their way out.
    assert forecast.stash_peak_bytes == (120 + 20) * TOKENS
    assert forecast.recomputed_flops == 3 * small_block(0).rerun_flops.at(TOKENS)
    assert forecast.step_seconds == pytest.approx(3 * 6 + 3 + 3 + 2 * 20 / 120)


def test_a_kept_block_above_hides_the_fetch():
    swapped = forecast_of(small_profile(2), policy="swap", keep_last=1)
    assert swapped.step_seconds == 2 * 6 + 3
    # Kept bytes of the last block, and the first block landing already.
    assert swapped.stash_peak_bytes == 2 * 120 * TOKENS
    assert swapped.peak_bytes == BASE + 2 * 120 * TOKENS + 600 + 11


def test_a_slow_link_shows_in_each_direction():
    slow = small_profile(2, link=Link(to_host=120 * TOKENS / 5, to_device=120 * TOKENS / 7))
    # Out: 5 s behind 2 s of forward. Back: 7 s behind 4 s of backward.
    assert forecast_of(slow, policy="swap", keep_last=1).step_seconds == pytest.approx(2 * 6 + 3 + 3 + 3)


def test_several_kept_blocks_hide_a_fetch_together():
    slow = small_profile(3, link=Link(to_host=120 * TOKENS, to_device=120 * TOKENS / 9))
    assert forecast_of(slow, policy="swap", keep_last=2).step_seconds == pytest.approx(3 * 6 + 3 + 1)


def test_on_cpu_copies_are_synchronous_and_only_the_stash_counts():
    profile = on_cpu(small_profile(), link=Link(to_host=120 * TOKENS, to_device=120 * TOKENS))
    forecast = forecast_of(profile, policy="swap", keep_last=0)
    assert forecast.stash_peak_bytes == 2 * 120 * TOKENS
    assert forecast.peak_bytes == 1000 + 10 + 1000 + 2000 + 2 * 120 * TOKENS
    assert forecast.step_seconds == 3 * 6 + 3 + 6
    # In forward nothing of the block before is left: with one block kept, its own bytes beside nothing.
    assert forecast_of(on_cpu(small_profile(1)), policy="swap", keep_last=0).stash_peak_bytes == 120 * TOKENS


def test_states_that_are_there_already_are_not_counted_twice():
    there = small_profile(
        states=ModelStates(
            parameters=1000, buffers=10, gradients=1000, optimizer=2000, gradients_present=1000,
            optimizer_present=2000,
        )
    )  # fmt: skip
    accumulating = make_plan(there, make_settings(policy="none"), accumulating=True)
    assert accumulating.accumulating
    assert accumulating.forecast.peak_bytes == 5000 + 110 + (3 * 120 - 10) * TOKENS + 70 + ALLOWED
    assert forecast_of(there, policy="none").peak_bytes == 4000 + 110 + (3 * 120 - 10) * TOKENS + 400 + 70 + ALLOWED


def test_gradients_that_are_there_count_at_every_point():
    plan = make_plan(small_profile(), make_settings(policy="swap", keep_last=0), accumulating=True)
    assert plan.forecast.peak_bytes == BASE + 1000 + 2 * 120 * TOKENS + 11


def test_where_gradients_are_large_the_end_of_backward_is_the_highest_point():
    states = ModelStates(parameters=1000, buffers=10, gradients=10**9 + 600, optimizer=2000)
    block = replace(small_block(0), gradients=10**9)
    profile = profile_of(
        [block], states=states, allocated_bytes=5000, shared=Growth(), outside_forward=Growth(), outside_peak=Growth()
    )
    assert forecast_of(profile, policy="none").peak_bytes == 5000 + 2000 + 10**9 + 600 + ALLOWED
    with pytest.raises(PlanInfeasibleError, match=r"at +end of backward"):
        forecast_of(profile, policy="none", budget="900MB")


@pytest.mark.parametrize(
    ("last", "tied", "more"),
    # Beside all gradients: rows of hidden states, and their sums in float32, a tenth of the rows' and one for each that
    # occurs; of a table that is a head as well its second gradient, and then the sum of both.
    [(0, 0, 0), (10**7, 0, 32 * 100), (1000, 0, 12 * 100 + 2000), (0, 10**7, 2 * 10**7), (0, 2000, 32 * 100 + 2000)],
)
def test_embeddings_go_backward_beside_all_gradients(last, tied, more):
    states = ModelStates(
        parameters=1000, buffers=10, gradients=10**9 + 10**7, gradients_last=last, gradients_tied=tied, optimizer=2000
    )
    block = replace(small_block(0), gradients=10**9, output=Growth(constant=1000))
    profile = profile_of(
        [block], states=states, allocated_bytes=5000, shared=Growth(), outside_forward=Growth(), outside_peak=Growth()
    )
    assert forecast_of(profile, policy="none").peak_bytes == 5000 + 2000 + 10**9 + 10**7 + more + ALLOWED


def test_temporaries_of_the_optimizers_step_come_behind_backward():
    """With all gradients and nothing of the blocks; in steps that start with gradients too."""
    there = {"shared": Growth(), "outside_forward": Growth(), "outside_peak": Growth(), "allocated_bytes": 5000}
    states = ModelStates(
        parameters=1000, buffers=10, gradients=1000, optimizer=2000, stepping=10**9, optimizer_name="Adam",
        assumed=False,
    )  # fmt: skip
    profile = profile_of([small_block(0)], states=states, **there)
    for accumulating in (False, True):
        plan = make_plan(profile, make_settings(policy="none"), accumulating=accumulating)
        assert plan.forecast.peak_bytes == 5000 + 2000 + 1000 + 10**9 + ALLOWED
        assert any("its step takes 953.67 MiB besides" in note for note in plan.notes)
    with pytest.raises(PlanInfeasibleError, match=r"at +optimizer's step") as refused:
        forecast_of(profile, policy="none", budget="900MB")
    assert "the step of Adam makes temporaries of 953.67 MiB: with fused=True" in str(refused.value)
    assert "temporaries of its step 953.67 MiB" in str(refused.value)
    assert forecast_of(on_cpu(profile), policy="none").peak_bytes < 10**9
    assumed = profile_of([small_block(0)], states=replace(states, stepping=0, assumed=True), **there)
    notes = make_plan(assumed, make_settings(policy="none")).notes
    assert any("foreach=True, PyTorch's default, takes 1000 B more behind backward" in note for note in notes)


def test_what_only_the_rerun_reads_is_gone_when_backward_starts():
    block = small_block(0)
    unsaved = replace(block, groups=(group(Role.INPUT, 10, saved=False), *block.groups[2:]))
    profile = replace(small_profile(1), blocks=(replace(unsaved, backward_peak=Growth(constant=10**6)),))
    forecast = forecast_of(profile, policy="recompute", keep_last=0)
    assert forecast.stash_peak_bytes == 120 * TOKENS
    assert forecast.peak_bytes == BASE + 110 * TOKENS + 800 + 10**6


def test_a_rerun_of_a_part_needs_room_for_what_it_makes():
    block = replace(small_block(0), rerun_peak=Growth(constant=5, linear=500))
    profile = replace(small_profile(2), blocks=(block, replace(block, name="last")))
    plan = make_plan(profile, make_settings(policy="memo", alpha=0.25, keep_last=1))
    rebuilt = TOKENS - plan.blocks[0].prefix
    assert 0 < rebuilt < TOKENS
    assert plan.forecast.peak_bytes == BASE + 120 * TOKENS + 600 + 200 + 500 * rebuilt + 5 + 3


def test_a_recomputed_block_is_run_again_as_a_whole():
    blocks = [small_block(0, sliceable=False, replayable=False, reason="it draws"), small_block(1)]
    plan = make_plan(replace(small_profile(), blocks=tuple(blocks)), make_settings(policy="memo", alpha=0.5))
    assert [block.executor for block in plan.blocks] == [Executor.RECOMPUTE, Executor.KEEP]
    assert plan.forecast.step_seconds == pytest.approx(2 * 6 + 3 + 2)
    assert plan.blocks[0].bytes_to_host == 10 * TOKENS


@pytest.mark.parametrize("policy", ["none", "swap", "recompute", "memo", "replay", "auto"])
@pytest.mark.parametrize("budget", ["45GiB", "900GiB"])
def test_forecast_equals_the_plain_reference(policy, budget):
    for profile in (llama_profile(6, tokens=65536), on_cpu(llama_profile(6, tokens=65536))):
        plan = make_plan(profile, make_settings(policy=policy, budget=budget))
        assert reference.peaks(profile, plan.blocks) == (
            plan.forecast.stash_peak_bytes,
            plan.forecast.peak_bytes,
        )
        assert reference.host_bytes(profile, plan.blocks) == plan.forecast.host_bytes
        assert [sum(reference.copied(profile, plan.blocks, i)) for i in range(6)] == [
            block.bytes_to_host for block in plan.blocks
        ]
        assert [reference.kept(profile, plan.blocks, i) for i in range(6)] == [
            block.bytes_kept for block in plan.blocks
        ]


def test_the_last_block_keeps_what_its_rerun_starts_from_where_nothing_would_hide_the_copies():
    """In the same memory: it goes straight into backward, which needs them first."""
    profile = small_profile()
    everywhere = make_plan(profile, make_settings(policy="recompute", keep_last=0)).forecast
    plan = make_plan(profile, make_settings(policy="replay", keep_last=0, budget=everywhere.peak_bytes))
    assert [block.resident for block in plan.blocks] == [False, False, True]
    assert plan.blocks[2].bytes_to_host == 0
    assert plan.blocks[2].bytes_kept >= 20 * TOKENS
    assert plan.forecast.peak_bytes <= everywhere.peak_bytes
    # Less the copies of 20 of 120 bytes, each way, that nothing hid.
    assert plan.forecast.step_seconds <= everywhere.step_seconds - 2 * 20 / 120 + 1e-9
    on_host = make_plan(on_cpu(profile), make_settings(policy="replay", keep_last=0, budget=everywhere.peak_bytes))
    assert not any(block.resident for block in on_host.blocks)


@pytest.mark.parametrize("policy", ["swap", "recompute", "replay"])
def test_what_stays_where_it_was_saved_is_never_there_twice(policy):
    # Random numbers of 1,000 bytes are too few to be moved; the last block's are resident as well.
    blocks = [llama_block(number, tokens=1000, groups=(group(Role.RANDOM, 1),)) for number in range(2)]
    profile = profile_of(blocks)
    plan = make_plan(profile, make_settings(policy=policy, keep_last=0, budget=10**12))
    assert plan.forecast.bytes_kept == plan.forecast.stash_peak_bytes == 2000
    assert (plan.forecast.stash_peak_bytes, plan.forecast.peak_bytes) == reference.peaks(profile, plan.blocks)


def test_rows_that_stay_are_copied_out_of_what_was_saved():
    block, link = small_block(0), Link(to_host=1.0, to_device=1.0)
    foot = footprint(block, plan_block(block, Executor.REPLAY, TOKENS, 2048, 1024), link)
    assert foot.kept_rows == foot.kept == 100 * 1024
    resident = footprint(block, plan_block(block, Executor.REPLAY, TOKENS, 2048, 1024, resident=True), link)
    assert (resident.kept_rows, resident.kept) == (100 * 1024, 100 * 1024 + 20 * TOKENS)


def test_the_gradient_that_the_last_block_gets_counts_twice_unless_a_norm_made_it():
    """By tiles the gradient of the input is written over it, where nobody keeps it."""
    block = Footprint(
        skeletal=0, outgoing=0, kept=0, full=0, spent=0, landing=0, copies=False, stashed=False, forward=0.0,
        backward=0.0, again=0.0, to_host=0.0, to_device=0.0, forward_peak=0, backward_peak=0, end_peak=0, rerun_peak=0,
        gradients=0, output=10**9, stretches=((Stretch.MIDDLE, 10**10, 0),),
    )  # fmt: skip
    peaks = []
    for behind in (False, True):
        around = Surroundings.of(replace(small_profile(), norm_behind=behind), TOKENS)
        peaks.append(run_course(around, [block, block]).device_peak)
    assert peaks[0] - peaks[1] == 10**9
    assert peaks[1] >= 10**10


@pytest.mark.parametrize("tiled", [True, False])
def test_what_the_model_returned_is_there_until_backward_is_over(tiled):
    """Blocks that were timed whole had their results with them; the last by tiles is handed one gradient as large."""
    size = 10**9
    block = Footprint(
        skeletal=0, outgoing=0, kept=0, full=0, spent=0, landing=0, copies=False, stashed=False, forward=0.0,
        backward=0.0, again=0.0, to_host=0.0, to_device=0.0, forward_peak=0, backward_peak=10**10, end_peak=0,
        rerun_peak=0, gradients=10**7, output=size, stretches=((Stretch.MIDDLE, 10**10, 0),) * tiled,
    )  # fmt: skip
    courses = []
    for returned in (0, size, 3 * size):
        around = Surroundings.of(replace(small_profile(), result=Growth(constant=returned)), TOKENS)
        courses.append(run_course(around, [block] * 3))
    assert [course.index for course in courses] == ([2, 0, 0] if tiled else [0, 0, 0])
    assert courses[1].device_peak - courses[0].device_peak == (2 * 10**7 if tiled else 0)
    assert courses[2].device_peak - courses[1].device_peak == 2 * size


@pytest.mark.parametrize("kept", [0, 10**9], ids=["sent away", "kept by the first block"])
def test_what_the_first_block_is_given_is_there_once_or_not_at_all_while_blocks_go_backward(kept):
    """An embedding's result goes with the forward; a tensor of the caller's stays, and is what the block keeps."""
    block = Footprint(
        skeletal=0, outgoing=0, kept=kept, full=0, spent=0, landing=0, copies=False, stashed=False, forward=0.0,
        backward=0.0, again=0.0, to_host=0.0, to_device=0.0, forward_peak=10**8, backward_peak=10**10, end_peak=0,
        rerun_peak=0, gradients=0, entry=kept,
    )  # fmt: skip
    peaks = []
    for entry in (Growth(), Growth(constant=10**9)):
        around = Surroundings.of(replace(small_profile(), entry=entry), TOKENS)
        peaks.append(run_course(around, [block]).device_peak)
    assert peaks[0] - peaks[1] == 10**9 - kept


@pytest.mark.parametrize("seed", range(8))
def test_the_input_of_a_late_block_takes_what_the_worst_step_to_it_takes(seed):
    """Every step of every block's way, one by one; all else is small beside them."""
    drawn = random.Random(seed)
    around = Surroundings.of(small_profile(), TOKENS)
    block = small_block(0)
    plain = footprint(block, plan_block(block, Executor.KEEP, TOKENS), Link(to_host=1.0, to_device=1.0))
    feet = [
        replace(
            plain, late=True, from_below=bool(index) and drawn.random() < 0.8, kept=drawn.randrange(50),
            full=0, result=10**6 + drawn.randrange(10**6), skeletal=0, gradients=0, entry=0,
            passing_peak=drawn.choice([0, 10**7, drawn.randrange(10**7)]),
        )
        for index in range(12)
    ]  # fmt: skip
    stashes, peaks = [], []
    for index in range(12):
        at = index
        while feet[at].from_below:
            at -= 1
            stashes.append(sum(foot.kept for foot in feet[: index + 1]) + feet[at].result)
            peaks.append(stashes[-1] + feet[at].passing_peak + around.outside_gradients)
    course = run_course(around, feet)
    assert (course.stash_peak, course.device_peak, course.phase) == (max(stashes), max(peaks), "input made again")
