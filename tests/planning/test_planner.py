"""What each policy plans, for which blocks, and what the plan says about it."""

import subprocess
import sys
from dataclasses import replace

import pytest

from memo_runtime.config import Policy, Settings, make_settings
from memo_runtime.errors import BlockFallbackError, MemoError, PlanInfeasibleError
from memo_runtime.persist import load_plan, save
from memo_runtime.planning.planner import make_plan
from memo_runtime.planning.sheet import PlanRequestError
from memo_runtime.records import ArgumentAxes, Executor, Growth, ModelStates, Role
from memo_runtime.units import GiB, format_bytes
from tests.planning.builders import (
    group,
    llama_block,
    llama_groups,
    llama_profile,
    on_cpu,
    opaque,
    profile_of,
)

KEEP, REPLAY, RECOMPUTE, NATIVE = Executor.KEEP, Executor.REPLAY, Executor.RECOMPUTE, Executor.NATIVE


def plan(profile, tokens=None, **settings):
    return make_plan(profile, make_settings(**settings), tokens=tokens)


def executors(planned):
    return [block.executor for block in planned.blocks]


def prefixes(planned):
    return [block.prefix for block in planned.blocks]


SHORT = llama_profile(4, tokens=4096)


def test_none_keeps_everything():
    assert executors(plan(SHORT, policy="none")) == [KEEP] * 4


def test_fractions_by_name():
    assert prefixes(plan(SHORT, policy="swap")) == [4096] * 4
    assert executors(plan(SHORT, policy="swap")) == [REPLAY, REPLAY, KEEP, KEEP]
    assert prefixes(plan(SHORT, policy="recompute")) == [0, 0, 4096, 4096]


@pytest.mark.parametrize("policy", ["memo", "replay"])
def test_a_given_fraction_is_rounded_down_to_granules(policy):
    planned = plan(SHORT, policy=policy, alpha=0.37, keep_last=0)
    assert prefixes(planned) == [1408] * 4
    assert (planned.policy, planned.alpha) == (policy, 0.37)


def test_a_given_fraction_is_never_changed():
    with pytest.raises(MemoError):
        plan(SHORT, policy="memo", alpha=0.5, host_budget=10**6)


def test_the_closed_form_of_memo_for_this_link():
    planned = plan(llama_profile(16), policy="memo")
    swapped = [block for block in planned.blocks if block.executor is REPLAY]
    assert len({block.prefix for block in swapped}) == 1
    seconds = swapped[0].bytes_to_host / 50e9
    forward = planned.profile.blocks[0].forward_seconds.exact(131072)
    granule_seconds = 128 * 92228 / 50e9
    assert forward - granule_seconds <= seconds <= forward
    assert any("the link binds" in note for note in planned.notes)


def test_the_closed_form_is_lowered_to_the_host_budget():
    planned = plan(llama_profile(16), policy="memo", host_budget="50GiB")
    assert 50 * GiB * 0.99 < planned.forecast.host_bytes <= 50 * GiB
    assert any("host memory binds" in note or "exceeds" in note for note in planned.notes)


def test_the_closed_form_gives_way_to_a_device_budget():
    planned = plan(llama_profile(16), policy="memo", budget="36GiB")
    assert set(prefixes(planned)) == {0, 131072}
    assert planned.forecast.peak_bytes <= 36 * GiB


@pytest.mark.parametrize(
    ("count", "keep_last", "kept"),
    [(1, None, 0), (2, None, 1), (3, None, 2), (9, None, 2), (3, 0, 0), (3, 3, 3)],
)
def test_the_last_blocks_are_kept(count, keep_last, kept):
    planned = plan(llama_profile(count, tokens=4096), policy="swap", keep_last=keep_last)
    assert executors(planned) == [REPLAY] * (count - kept) + [KEEP] * kept


def test_every_stack_keeps_its_own_last_blocks():
    blocks = [llama_block(i, stack=i // 3, tokens=4096) for i in range(6)]
    planned = plan(profile_of(blocks), policy="swap", keep_last=1)
    assert executors(planned) == [REPLAY, REPLAY, KEEP] * 2


@pytest.mark.parametrize("policy", ["swap", "auto", "none"])
def test_more_kept_blocks_than_there_are(policy):
    with pytest.raises(ValueError, match=r"keep_last=5.*layers\.0 to .*layers\.3.* has 4 blocks: give 0 to 4"):
        plan(SHORT, policy=policy, keep_last=5)


def test_tiles_cannot_be_planned_where_nobody_tried_them():
    with pytest.raises(PlanRequestError, match=r"says nothing of them: make it with memo\.profile\(.*tiles=True\)"):
        make_plan(SHORT, Settings(policy=Policy.TILED))


class TestAuto:
    def test_everything_stays_if_it_fits(self):
        planned = plan(llama_profile(16, tokens=16384))
        assert executors(planned) == [KEEP] * 16
        assert planned.forecast.bytes_to_host == 0

    def test_else_it_moves_what_it_must(self):
        planned = plan(llama_profile(16))
        assert REPLAY in executors(planned)
        assert planned.forecast.peak_bytes <= 79 * GiB

    def test_a_given_number_of_kept_blocks_is_obeyed(self):
        planned = plan(llama_profile(16), keep_last=3)
        assert executors(planned) == [REPLAY] * 13 + [KEEP] * 3

    def test_on_cpu_it_plans_as_memo_and_says_so(self):
        profile = on_cpu(SHORT)
        planned = plan(profile)
        assert planned.blocks == plan(profile, policy="memo").blocks
        assert any("plans as memo" in note for note in planned.notes)
        assert planned.limits.device_source.startswith("not limited")

    def test_on_cpu_a_budget_makes_it_plan_as_for_a_device(self):
        profile = on_cpu(llama_profile(8, tokens=65536))
        planned = plan(profile, budget="30GiB")
        assert planned.forecast.peak_bytes <= 30 * GiB
        assert executors(plan(profile, budget="900GiB")) == [KEEP] * 8

    def test_blocks_that_cannot_be_sliced_are_run_again_as_a_whole(self):
        blocks = [opaque(llama_block(i)) if i % 2 else llama_block(i) for i in range(12)]
        planned = plan(profile_of(blocks), budget="50GiB")
        assert {block.executor for block in planned.blocks[1::2]} <= {RECOMPUTE, KEEP}
        assert planned.forecast.peak_bytes <= 50 * GiB


def test_replay_on_cpu_keeps_no_rows_where_no_device_budget_is():
    planned = plan(on_cpu(SHORT), policy="replay")
    assert all(block.device_rows == 0 for block in planned.blocks)


class TestFallback:
    REPLAYED = opaque(llama_block(0, tokens=4096), "its mask has no token dimension", replayable=True)
    OPAQUE = opaque(llama_block(1, tokens=4096), "it saves other tensors on a slice")
    PROFILE = profile_of([REPLAYED, OPAQUE, llama_block(2, tokens=4096)])

    def test_a_fraction_falls_back_to_the_whole_block(self):
        planned = plan(self.PROFILE, policy="memo", alpha=0.5, keep_last=0)
        assert [(b.executor, b.prefix, b.reason) for b in planned.blocks] == [
            (REPLAY, 0, "its mask has no token dimension"),
            (RECOMPUTE, 0, "it saves other tensors on a slice"),
            (REPLAY, 2048, ""),
        ]

    def test_at_zero_a_full_rerun_is_the_policy_itself(self):
        planned = plan(self.PROFILE, policy="recompute", keep_last=0)
        assert [(b.executor, b.reason) for b in planned.blocks] == [
            (REPLAY, ""),
            (RECOMPUTE, "it saves other tensors on a slice"),
            (REPLAY, ""),
        ]

    def test_swap_never_falls_back(self):
        planned = plan(self.PROFILE, policy="swap", keep_last=0, strict=True)
        assert [(b.executor, b.prefix, b.reason) for b in planned.blocks] == [(REPLAY, 4096, "")] * 3

    def test_strict_names_blocks_and_reasons(self):
        with pytest.raises(BlockFallbackError, match="2 of 3 blocks cannot take policy 'memo'") as error:
            plan(self.PROFILE, policy="memo", alpha=0.5, keep_last=0, strict=True)
        assert "model.layers.0: its mask has no token dimension" in str(error.value)
        assert "model.layers.1: it saves other tensors on a slice" in str(error.value)

    def test_strict_says_each_reason_once_and_names_five_blocks(self):
        profile = profile_of([opaque(llama_block(i, tokens=4096), "it draws") for i in range(9)])
        with pytest.raises(BlockFallbackError) as error:
            plan(profile, policy="memo", alpha=0.5, keep_last=0, strict=True)
        assert str(error.value).count("it draws") == 1
        assert "model.layers.4 and 4 more" in str(error.value)

    def test_strict_does_not_mind_a_block_that_is_kept(self):
        profile = profile_of([llama_block(0, tokens=4096), opaque(llama_block(1, tokens=4096))])
        assert executors(plan(profile, policy="memo", alpha=0.5, keep_last=1, strict=True)) == [REPLAY, KEEP]

    def test_a_block_without_an_input_is_left_alone(self):
        lost = opaque(llama_block(0, tokens=0, groups=()), "it has no floating-point tensor argument")
        profile = profile_of([lost, llama_block(1, tokens=4096)])
        planned = plan(profile, policy="memo", alpha=0.5, keep_last=0, tokens={0: 8192})
        assert planned.blocks[0].executor is NATIVE
        assert "no floating-point" in planned.blocks[0].reason
        assert any("not managed" in note for note in planned.notes)


class TestLengths:
    def test_other_lengths_reuse_the_profile(self):
        planned = plan(SHORT, policy="memo", alpha=0.5, tokens={0: 8192})
        assert {block.tokens for block in planned.blocks} == {8192}
        assert planned.blocks[0].prefix == 4096
        assert any("extrapolated from 4,096" in note for note in planned.notes)

    def test_stacks_that_are_not_named_keep_their_length(self):
        blocks = [llama_block(i, stack=i, tokens=4096) for i in range(2)]
        planned = plan(profile_of(blocks), policy="swap", keep_last=0, tokens={1: 2048})
        assert [block.tokens for block in planned.blocks] == [4096, 2048]

    @pytest.mark.parametrize(("tokens", "text"), [({7: 128}, "names stack 7"), ({0: 0}, "not a length")])
    def test_lengths_that_are_none(self, tokens, text):
        with pytest.raises(PlanRequestError, match=text):
            plan(SHORT, policy="swap", tokens=tokens)

    @pytest.mark.parametrize("tokens", [1, 2, 3, 7, 17, 1001])
    @pytest.mark.parametrize("policy", ["swap", "recompute", "memo", "replay", "auto"])
    def test_odd_and_tiny_lengths(self, policy, tokens):
        for profile in (SHORT, on_cpu(SHORT)):
            planned = plan(profile, policy=policy, tokens={0: tokens}, budget="20GiB")
            assert all(tokens - block.prefix != 1 or tokens == 1 for block in planned.blocks)


def test_notes_say_whose_optimizer_state_is_reserved():
    assert any("assumed: AdamW" in note for note in plan(SHORT, policy="swap").notes)
    named = replace(
        SHORT,
        states=ModelStates(parameters=1, buffers=0, gradients=1, optimizer=2, optimizer_name="Lion", assumed=False),
    )
    assert any("that of Lion" in note for note in plan(named, policy="swap").notes)


def test_notes_say_which_sizes_are_estimates():
    groups = (*llama_groups(), group(Role.WHOLE, 3, estimated=True))
    profile = profile_of([llama_block(0, tokens=4096, groups=groups), llama_block(1, tokens=4096)])
    assert any("model.layers.0 depend on data" in note for note in plan(profile, policy="swap").notes)


def test_a_plan_states_its_limits_and_its_floor():
    planned = plan(SHORT, policy="swap", host_budget="1TiB")
    assert (planned.limits.host_bytes, planned.limits.host_source) == (1024 * GiB, "host_budget")
    splinters = 4 * (SHORT.outside_peak.at(SHORT.blocks[0].tokens) // 3)
    assert planned.limits.device_bytes == 79 * GiB - splinters
    said = planned.limits.device_source
    assert said == f"memory of H100, less {format_bytes(splinters)} that large tensors splinter"
    floor = plan(SHORT, policy="recompute", keep_last=0)
    assert planned.floor_bytes == floor.forecast.peak_bytes


def test_the_default_limit_leaves_room_for_what_the_largest_tensors_splinter():
    asked = make_settings(policy="recompute")

    def limit(profile, **how):
        return make_plan(profile, replace(asked, **how)).limits

    profile = llama_profile(4, outside_peak=Growth())
    # An MLP's result: 131,072 tokens of 8,192 numbers of two bytes.
    assert limit(profile).device_bytes == 79 * GiB - 4 * 2 * GiB
    assert limit(profile, budget=79 * GiB).device_bytes == 79 * GiB
    joined = limit(replace(profile, expandable=True))
    assert (joined.device_bytes, joined.device_source) == (79 * GiB, "memory of H100")
    # Never more than a quarter.
    small = llama_profile(4, outside_peak=Growth(), tokens=32768, device_bytes=20 * GiB)
    assert limit(small).device_bytes == 20 * GiB - 4 * GiB // 2
    logits = replace(small, outside_peak=Growth(constant=9 * GiB))
    assert limit(logits, budget=40 * GiB).device_bytes == 40 * GiB
    with pytest.raises(PlanInfeasibleError, match=r"15\.00 GiB on H100 \(memory of H100, less 5\.00 GiB"):
        limit(logits)
    assert limit(on_cpu(profile)).device_source.startswith("not limited")


def test_a_plan_is_a_table_and_survives_a_file(tmp_path):
    planned = plan(llama_profile(4), policy="replay", budget="60GiB")
    assert "model.layers.0" in str(planned)
    save(planned, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == planned


def test_a_model_without_blocks_gets_an_empty_plan():
    assert plan(profile_of([]), policy="none").blocks == ()
    assert plan(profile_of([])).blocks == ()
    assert plan(profile_of([]), policy="memo").blocks == ()


def test_planning_loads_neither_torch_nor_a_solver():
    code = (
        "import sys, memo_runtime.planning.planner, memo_runtime.planning.compare;"
        "sys.exit(', '.join({'torch', 'pulp', 'numpy', 'ortools'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_plan_that_saves_nothing_says_so():
    tiny = profile_of([llama_block(i, groups=(group(Role.INPUT, 8), group(Role.TOKEN, 8))) for i in range(4)])
    for policy in ("swap", "recompute"):
        notes = plan(tiny, tokens={0: 1}, policy=policy, keep_last=0).notes
        assert any("nothing is saved on the device" in note for note in notes) == (policy == "swap")
        assert not any("nothing is saved" in note for note in plan(SHORT, policy=policy).notes)
    assert not any("nothing is saved" in note for note in plan(tiny, tokens={0: 1}, policy="none").notes)


def test_a_length_is_that_of_the_longest_stack_and_the_others_keep_their_proportion():
    blocks = [llama_block(i, stack=i // 2, tokens=(1024, 512, 0)[i // 2]) for i in range(6)]
    profile = profile_of(blocks)
    settings = make_settings(policy="swap")
    assert make_plan(profile, settings, longest=1024) == make_plan(profile, settings)
    shorter = make_plan(profile, settings, longest=896)
    assert [block.tokens for block in shorter.blocks] == [896, 896, 448, 448, 0, 0]
    assert shorter.seq_len == 896
    (said,) = [note for note in shorter.notes if "in proportion to the profiled ones" in note]
    assert "cross-attention" in said
    alone = make_plan(profile_of(blocks[:2]), settings, longest=896)
    assert not any("in proportion" in note for note in alone.notes)


def test_a_mask_of_all_pairs_is_said_to_count_with_the_square_of_the_length():
    pairs = (ArgumentAxes(leaf=0, dims=(1,)), ArgumentAxes(leaf=1, dims=(2, 3)))
    for arguments, said in ((pairs, True), (pairs[:1], False)):
        profile = profile_of([llama_block(i, tokens=1024, arguments=arguments) for i in range(4)])
        settings = make_settings(policy="recompute")
        for tokens in (512, 1024, 4096):
            notes = make_plan(profile, settings, longest=tokens).notes
            assert any("16.8 million pairs" in note for note in notes) == (said and tokens > 1024)
        with pytest.raises(PlanInfeasibleError) as refused:
            make_plan(profile, make_settings(policy="recompute", budget="1MiB"), longest=4096)
        assert ("16.8 million pairs" in str(refused.value)) == said
