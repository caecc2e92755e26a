"""The table of actions, and the exact bytes of every one of them."""

import pytest

from memo_runtime.planning.actions import block_actions, plan_block
from memo_runtime.records import Action, Executor, Role
from tests.planning.builders import group, llama_block

KEEP, HOST, PREFIX, TAIL, REBUILD = Action.KEEP, Action.HOST, Action.PREFIX, Action.TAIL, Action.REBUILD

#: A group per row of the table, at 4,096 tokens.
GROUPS = {
    "parameter": group(Role.PARAMETER, constant=4096),
    "shared": group(Role.SHARED, 128),
    "token": group(Role.TOKEN, 100),
    "token padded": group(Role.TOKEN, 100, multiple=64),
    "input": group(Role.INPUT, 10),
    "input unsaved": group(Role.INPUT, 10, saved=False),
    "mixer": group(Role.MIXER, 10),
    "mixer unsaved": group(Role.MIXER, 10, saved=False),
    "mixer unsaved whole": group(Role.MIXER, 10, saved=False, splits=False),
    "mixer padded unsaved": group(Role.MIXER, 10, saved=False, multiple=64),
    "random": group(Role.RANDOM, 10),
    "random small": group(Role.RANDOM, constant=1000, splits=False),
    "random small unsaved": group(Role.RANDOM, constant=1000, splits=False, saved=False),
    "whole": group(Role.WHOLE, quadratic=1),
    "whole unsaved": group(Role.WHOLE, quadratic=1, saved=False),
    "fixed": group(Role.FIXED, constant=2000),
    "fixed small": group(Role.FIXED, constant=8),
}

#: group: actions of (keep, recompute, replay at 0, replay at 1,024, replay at 4,096).
TABLE = {
    "parameter": (KEEP, KEEP, KEEP, KEEP, KEEP),
    "shared": (KEEP, KEEP, KEEP, KEEP, KEEP),
    "token": (KEEP, REBUILD, REBUILD, PREFIX, HOST),
    "token padded": (KEEP, REBUILD, REBUILD, HOST, HOST),
    "input": (KEEP, HOST, HOST, HOST, HOST),
    "input unsaved": (KEEP, HOST, HOST, TAIL, REBUILD),
    "mixer": (KEEP, REBUILD, HOST, HOST, HOST),
    "mixer unsaved": (KEEP, REBUILD, HOST, TAIL, REBUILD),
    "mixer unsaved whole": (KEEP, REBUILD, HOST, HOST, REBUILD),
    "mixer padded unsaved": (KEEP, REBUILD, HOST, HOST, REBUILD),
    "random": (KEEP, REBUILD, HOST, HOST, HOST),
    "random small": (KEEP, REBUILD, KEEP, KEEP, KEEP),
    "random small unsaved": (KEEP, REBUILD, KEEP, KEEP, REBUILD),
    "whole": (KEEP, REBUILD, REBUILD, HOST, HOST),
    "whole unsaved": (KEEP, REBUILD, HOST, HOST, REBUILD),
    "fixed": (KEEP, REBUILD, REBUILD, REBUILD, HOST),
    "fixed small": (KEEP, REBUILD, REBUILD, REBUILD, KEEP),
}

CASES = [(Executor.KEEP, 0), (Executor.RECOMPUTE, 0), *((Executor.REPLAY, a) for a in (0, 1024, 4096))]


def block_of(*groups):
    return llama_block(tokens=4096, groups=groups)


@pytest.mark.parametrize("name", GROUPS)
def test_the_action_of_every_role(name):
    block = block_of(GROUPS[name])
    actions = tuple(block_actions(block, executor, 4096, prefix)[0] for executor, prefix in CASES)
    assert actions == TABLE[name]


def one(name, executor, prefix=0, device_rows=0, tokens=4096):
    return plan_block(block_of(GROUPS[name]), executor, tokens, prefix, device_rows)


def test_a_prefix_is_split_between_device_host_and_rerun():
    plan = one("token", Executor.REPLAY, 1024, 256)
    assert (plan.bytes_kept, plan.bytes_to_host, plan.bytes_to_device) == (25_600, 76_800, 76_800)
    assert plan.alpha == 0.25


def test_a_whole_prefix_may_stay_on_the_device_in_part():
    plan = one("token", Executor.REPLAY, 4096, 256)
    assert plan.actions == (PREFIX,)
    assert (plan.bytes_kept, plan.bytes_to_host) == (25_600, 384_000)
    assert plan.recomputed_flops == 0


def test_a_tail_goes_to_the_host():
    assert one("input unsaved", Executor.REPLAY, 1024).bytes_to_host == 30_720


def test_a_small_part_is_copied_and_a_small_group_is_not():
    assert one("token", Executor.REPLAY, 8).bytes_to_host == 800
    small = one("random small", Executor.REPLAY, 1024)
    assert (small.bytes_to_host, small.bytes_kept) == (0, 1000)


def test_what_no_backward_reads_is_not_kept():
    assert one("input unsaved", Executor.KEEP).bytes_kept == 0
    assert one("random small unsaved", Executor.REPLAY, 0).bytes_kept == 0
    assert one("parameter", Executor.KEEP).bytes_kept == 0
    assert one("shared", Executor.KEEP).bytes_kept == 0
    assert one("token", Executor.KEEP).bytes_kept == 409_600


def test_padded_and_quadratic_groups_count_their_real_size():
    assert one("token padded", Executor.REPLAY, 10, tokens=65).bytes_to_host == 12_800
    assert one("whole", Executor.REPLAY, 1024).bytes_to_host == 4096**2


def test_host_slots_are_aligned():
    block = block_of(group(Role.TOKEN, 1), group(Role.INPUT, 1, saved=True))
    plan = plan_block(block, Executor.REPLAY, 4100, 65)
    assert plan.bytes_to_host == 65 + 4100
    assert plan.host_bytes == 128 + 4160


def test_flops_that_are_spent_again():
    block = llama_block(tokens=4096)
    row = block.rerun_flops.linear
    assert plan_block(block, Executor.REPLAY, 4096, 1024).recomputed_flops == row * 3072
    assert plan_block(block, Executor.REPLAY, 4096, 4096).recomputed_flops == 0
    assert plan_block(block, Executor.KEEP, 4096).recomputed_flops == 0
    again = plan_block(block, Executor.RECOMPUTE, 4096)
    assert again.recomputed_flops == block.recompute_flops.at(4096)


def test_the_prefix_of_a_kept_block_is_everything_and_of_a_recomputed_one_nothing():
    assert plan_block(llama_block(), Executor.KEEP, 4096).alpha == 1.0
    assert plan_block(llama_block(), Executor.RECOMPUTE, 4096, 4096).alpha == 0.0
