"""``auto`` between replay and tiles: when tiles are tried, which is taken, and what the plan says of it."""

import re
from dataclasses import replace

import pytest

from memo_runtime.config import longest_tile, make_settings
from memo_runtime.errors import BlockFallbackError, PlanInfeasibleError
from memo_runtime.planning.executors import tiles_are_worth_trying
from memo_runtime.planning.planner import make_plan
from memo_runtime.planning.sheet import Sheet, lengths_of
from memo_runtime.records import Executor, Growth, Link, Moment, TileAt, TiledProfile
from memo_runtime.units import GiB
from tests.planning.builders import llama_block, llama_profile, on_cpu, opaque, profile_of

ROW = 2 * 2048
#: A budget that replay keeps only by running everything again, and one that it does not keep.
TIGHT, TOO_TIGHT = 28 * GiB, 17 * GiB


def by_tiles(*, speed=1.0, reason=""):
    """What a block of ``llama_block`` takes by tiles, ``speed`` times as fast as it is with nothing repeated."""
    block = llama_block()
    if reason:
        return {"tiled": None, "tiled_reason": reason}
    products = Growth(linear=2 * (2 * 8192 + 2 * 2048))
    takes = TiledProfile(
        stash=(Growth(linear=ROW), Growth(linear=ROW), Growth(linear=64)),
        resident=Growth(),
        products=(Growth(), Growth(), products),
        forward=(Moment(full=Growth(linear=3 * ROW), kept=products),),
        backward=(
            Moment(full=Growth(linear=6 * ROW), tile=Growth(linear=20 * ROW), fixed=4 * 60 * 10**6, kept=products),
        ),
        again_flops=Growth(linear=block.rerun_flops.linear),
        saved_flops=Growth(linear=block.rerun_flops.linear * 0.9),
        attention=("cudnn",),
        forward_seconds=_times(block.forward_seconds, 1 / speed),
        backward_seconds=_times(block.backward_seconds, 1 / speed),
        seconds_per_flop=1 / 6e14 / speed,
        saved_seconds=Growth(linear=block.rerun_flops.linear * 0.9 / 6e14 / speed),
        product_seconds=Growth(linear=6e-7 / speed),
    )
    return {"tiled": takes}


def _times(growth, factor):
    return replace(growth, linear=growth.linear * factor, quadratic=growth.quadratic * factor)


def tried(profile, **how):
    return replace(profile, blocks=tuple(replace(block, **by_tiles(**how)) for block in profile.blocks))


def worth(profile, **settings):
    wanted = make_settings(**settings)
    sheet = Sheet(profile, lengths_of(profile, None))
    try:
        seconds = make_plan(profile, wanted).forecast.step_seconds
    except PlanInfeasibleError:
        seconds = None
    return tiles_are_worth_trying(sheet, wanted, seconds)


def test_tiles_are_tried_where_replay_is_slower_than_keeping_or_does_not_fit():
    profile = llama_profile()
    assert worth(profile, budget=TIGHT, host_budget="16GiB")
    assert worth(profile, budget=TOO_TIGHT)


def test_tiles_are_tried_where_replay_hides_nearly_all_of_its_copies():
    """Compiled tiles are faster than the blocks themselves: 1 % is not the most that there is to gain."""
    profile, budget = llama_profile(link=Link(to_host=60e9, to_device=60e9)), "40GiB"
    kept, replayed = (plan(one, budget=b).forecast.step_seconds for one, b in ((profile, "500GiB"), (profile, budget)))
    assert 1.005 < replayed / kept < 1.02
    assert worth(profile, budget=budget)


@pytest.mark.parametrize(("budget", "way"), [("500GiB", "as they are"), ("30GiB", "by replay")])
def test_tiles_are_tried_where_nothing_needs_to_be_moved_or_is_waited_for(budget, way):
    profile = llama_profile(tokens=65536, link=Link(to_host=1e12, to_device=1e12))
    assert worth(profile, budget=budget)
    without, faster, slower = (
        plan(one, budget=budget) for one in (profile, tried(profile, speed=1.1), tried(profile, speed=0.9))
    )
    assert slower.blocks == without.blocks
    assert {block.executor for block in faster.blocks} == {Executor.TILED}
    assert faster.forecast.step_seconds < without.forecast.step_seconds
    assert re.fullmatch(rf"blocks run by tiles: a step of .* s, and .* s {way}", faster.notes[0])
    assert slower.notes[0].startswith(f"blocks run {way}: a step of ")


@pytest.mark.parametrize(
    ("profile", "settings"),
    {
        "everything fits, in short steps": (llama_profile(tokens=4096), {}),
        "steps too short to pay for it": (llama_profile(1, tokens=2048), {"budget": "8.45GiB", "host_budget": "1GiB"}),
        "another policy": (llama_profile(), {"policy": "replay", "budget": TOO_TIGHT}),
        "blocks that stay were named": (llama_profile(), {"keep_last": 1, "budget": TOO_TIGHT}),
        "done before": (tried(llama_profile(), reason="no"), {"budget": TOO_TIGHT}),
        "less than the model itself": (llama_profile(), {"budget": "1GiB"}),
        "a CPU without a budget": (on_cpu(llama_profile()), {}),
        "a CPU where replay fits": (on_cpu(llama_profile()), {"budget": "40GiB"}),
    }.values(),
)
def test_tiles_are_not_tried(profile, settings):
    assert not worth(profile, **settings)


def test_on_a_cpu_tiles_are_tried_where_replay_does_not_fit():
    assert worth(on_cpu(llama_profile()), budget="8.2GiB")


def plan(profile, **settings):
    return make_plan(profile, make_settings(**settings))


def test_the_faster_is_taken_and_both_times_are_said():
    settings = {"budget": TIGHT, "host_budget": "16GiB"}
    replay = plan(llama_profile(), **settings)
    fast, slow = (plan(tried(llama_profile(), speed=speed), **settings) for speed in (1.0, 0.5))
    assert {block.executor for block in fast.blocks} == {Executor.TILED}
    assert fast.forecast.step_seconds < replay.forecast.step_seconds
    assert fast.forecast.peak_bytes <= TIGHT
    assert fast.notes[0].startswith("blocks run by tiles: a step of ")
    assert slow.blocks == replay.blocks
    assert slow.notes[0].startswith("blocks run by replay: a step of ")
    assert "by tiles" in str(slow)
    alone = plan(tried(llama_profile()), policy="tiled", **settings)
    assert fast.blocks == alone.blocks


def about_tiles(profile, **settings):
    return [note for note in plan(profile, **settings).notes if "tiles" in note]


def test_an_untried_plan_says_what_it_costs():
    (note,) = about_tiles(llama_profile(), budget=TIGHT, host_budget="16GiB")
    assert note.startswith("blocks were not tried by tiles: by replay a step takes")
    assert note.endswith("% longer than with everything kept")
    assert about_tiles(llama_profile(tokens=65536), budget="500GiB") == []  # a run tries them


def test_steps_too_short_for_tiles_are_said():
    (note,) = about_tiles(llama_profile(tokens=4096))
    assert note == (
        "blocks were not tried by tiles; these would take 36.00 s before the first step, more than what 10,000 steps "
        "are taken to save (policy='tiled' tries them)"
    )
    assert about_tiles(on_cpu(llama_profile(tokens=4096))) == []



def test_where_replay_does_not_fit_tiles_do():
    with pytest.raises(PlanInfeasibleError):
        plan(llama_profile(), budget=TOO_TIGHT)
    found = plan(tried(llama_profile()), budget=TOO_TIGHT)
    assert found.notes[0] == "blocks run by tiles: replay does not fit"
    assert found.floor_bytes <= found.forecast.peak_bytes <= TOO_TIGHT
    with pytest.raises(PlanInfeasibleError, match=r"tokens instead of 131,072") as error:
        plan(tried(llama_profile()), budget="11.9GiB")
    longest = int(str(error.value).split("would fit")[1].split()[0].replace(",", ""))
    shorter = replace(llama_profile(tokens=longest))
    assert plan(tried(shorter), budget="11.9GiB").blocks[0].executor is Executor.TILED


def test_the_last_block_has_room_for_a_gradient_that_others_hold():
    profile = tried(llama_profile(2))
    none = replace(profile, blocks=tuple(replace(block, output=Growth()) for block in profile.blocks))
    last = replace(profile, blocks=(none.blocks[0], profile.blocks[1]))
    with_room, without, of_last = (
        plan(one, policy="tiled", alpha=1.0, keep_last=2, tile=8192).forecast.peak_bytes
        for one in (profile, none, last)
    )
    assert with_room == of_last == without + 131072 * ROW


def test_blocks_that_refuse_stay_under_replay_with_their_reason_named():
    reason = "autograd.Function 'Round': no operator shows it"
    profile = tried(llama_profile())
    odd = replace(profile.blocks[5], **by_tiles(reason=reason))
    mixed = replace(profile, blocks=(*profile.blocks[:5], odd, *profile.blocks[6:]))
    found = plan(mixed, budget=TIGHT, host_budget="60GiB", strict=True)
    assert {block.executor for block in found.blocks} == {Executor.TILED, Executor.REPLAY}
    assert found.blocks[5].executor is Executor.REPLAY
    assert f"'model.layers.5' cannot run by tiles: {reason}" in found.notes
    none = plan(tried(llama_profile(), reason=reason), budget=TIGHT)
    assert none.notes[0] == "blocks run by replay: none can by tiles"
    assert f"'model.layers.0' and 15 more cannot run by tiles: {reason}" in none.notes


def test_strict_still_refuses_what_replay_cannot():
    blocks = [opaque(llama_block(0)), *(llama_block(number) for number in range(1, 4))]
    profile = tried(profile_of(blocks), reason="no")
    with pytest.raises(BlockFallbackError, match="cannot take policy 'auto'"):
        plan(profile, budget=TIGHT, host_budget="60GiB", strict=True)


def test_room_that_tiles_give_back_is_used_for_more_of_them():
    """Products that go with their tile, before attention goes backward, leave room to keep more."""
    def going(takes):
        first = replace(takes.backward[0], kept=Growth(), own=takes.products[-1], at=TileAt.LATER_KEPT)
        bare = replace(takes.backward[0], kept=Growth(), at=TileAt.LATER_BARE)
        small = Growth(linear=ROW)
        return replace(takes, backward=(replace(first, full=small), bare))

    staying = tried(llama_profile())
    leaving = replace(
        staying, blocks=tuple(replace(block, tiled=going(block.tiled)) for block in staying.blocks)
    )
    settings = {"policy": "tiled", "budget": TIGHT, "host_budget": "16GiB"}
    before, after = plan(staying, **settings), plan(leaving, **settings)
    assert after.forecast.recomputed_flops < before.forecast.recomputed_flops
    assert after.forecast.peak_bytes <= TIGHT
    assert after.forecast.step_seconds < before.forecast.step_seconds
def test_a_tile_that_does_not_fit_is_told_one_that_does():
    profile = tried(llama_profile())
    settings = {"policy": "tiled", "alpha": 0.0, "keep_last": 0}
    least = plan(profile, **settings, tile=1024).forecast.peak_bytes
    with pytest.raises(PlanInfeasibleError, match=r"policy 'tiled', tile=65536") as caught:
        plan(profile, **settings, tile=65536, budget=least)
    (suggested,) = re.findall(r"tile=(\d+) instead of 65536", str(caught.value))
    assert int(suggested) >= 1024
    assert plan(profile, **settings, tile=int(suggested), budget=least).forecast.peak_bytes <= least


def test_products_of_lower_blocks_go_to_the_host_as_far_as_it_has_room():
    """Within the device budget more host memory makes the step shorter, up to nothing that is run again."""
    profile = tried(llama_profile())
    plans = [plan(profile, policy="tiled", budget="24GiB", host_budget=host) for host in ("16GiB", "60GiB", "200GiB")]
    assert plans[0].forecast.step_seconds > plans[1].forecast.step_seconds > plans[2].forecast.step_seconds
    for one in plans:
        assert one.forecast.peak_bytes <= 24 * GiB
        assert one.forecast.host_bytes <= one.limits.host_bytes
        assert all(block.sent == 0 for block in one.blocks if block.device_rows)
    assert sum(block.sent for block in plans[1].blocks) > 0
    assert all(block.sent == (0 if block.device_rows else block.tokens) for block in plans[2].blocks)
    kept = plan(profile, policy="tiled", budget="500GiB").forecast.step_seconds
    assert plans[2].forecast.step_seconds == pytest.approx(kept, rel=0.01)


def test_what_the_link_does_not_hide_of_products_is_waited_for():
    def seconds(rate):
        profile = tried(llama_profile(link=Link(to_host=rate, to_device=rate)))
        return plan(profile, policy="tiled", alpha=1.0, keep_last=1, budget="24GiB").forecast.step_seconds

    kept = plan(tried(llama_profile()), policy="tiled", budget="500GiB").forecast.step_seconds
    products = 16 * 131072 * 2 * (2 * 8192 + 2 * 2048)
    assert seconds(50e9) == pytest.approx(kept, rel=0.01)
    assert seconds(5e9) > kept + products * 15 / 16 / 5e9


def test_slow_copies_are_not_chosen():
    profile = tried(llama_profile(link=Link(to_host=5e9, to_device=5e9)))
    assert not any(block.sent for block in plan(profile, policy="tiled", budget="24GiB").blocks)


def in_groups(profile):
    """Of each block a part of its moments is one group's of 8 heads, and a group takes a thousandth of the FLOPs."""

    def one(takes):
        moments = [replace(moment, full=Growth(linear=whole * ROW), part=Growth(linear=part * ROW))
                   for (moment,), whole, part in ((takes.forward, 1, 2), (takes.backward, 2, 4))]  # fmt: skip
        more = Growth(linear=takes.again_flops.linear / 1000)
        return replace(
            takes, heads=8, forward_by_groups=(moments[0],), backward_by_groups=(moments[1],), group_flops=more
        )

    return replace(profile, blocks=tuple(replace(block, tiled=one(block.tiled)) for block in profile.blocks))


def test_heads_go_in_groups_where_nothing_fits_without():
    least = {"policy": "tiled", "alpha": 0.0, "keep_last": 0, "tile": 8192}
    whole, profile = tried(llama_profile()), in_groups(tried(llama_profile()))
    budget = plan(whole, **least, budget="500GiB").forecast.peak_bytes - 1
    assert all(block.late for block in plan(whole, **least, budget=budget).blocks)
    found = plan(profile, **least, budget=budget)
    assert not any(block.late for block in found.blocks)
    assert {block.groups for block in found.blocks} == {2}
    assert found.forecast.peak_bytes <= budget
    assert "cudnn, 2 groups" in str(found)
    assert {block.groups for block in plan(profile, policy="tiled", budget=budget + 1).blocks} == {1}
    assert found.forecast.recomputed_flops > plan(profile, **least, budget="500GiB").forecast.recomputed_flops


def test_tiles_are_longer_where_that_costs_nothing_else():
    """With memory to spare the tile grows, and neither what is kept nor what is sent changes; a fixed one stays."""
    profile = tried(llama_profile())
    longest = longest_tile(profile.rows)
    free, fixed = plan(profile, policy="tiled", budget="500GiB"), plan(profile, policy="tiled", tile=longest)
    assert {block.tile for block in free.blocks} == {4 * longest}
    assert {block.tile for block in fixed.blocks} == {longest}
    bare = plan(profile, policy="tiled", alpha=0.0, keep_last=0, tile=longest).forecast.peak_bytes
    tight = plan(profile, policy="tiled", alpha=0.0, keep_last=0, budget=bare)
    assert {block.tile for block in tight.blocks} == {longest}
    for budget in (TIGHT, 32 * GiB, 40 * GiB):
        some = plan(profile, policy="tiled", budget=budget, host_budget="60GiB")
        again = plan(profile, policy="tiled", budget=budget, host_budget="60GiB", tile=longest)
        kept = [(block.prefix, block.sent, block.device_rows, block.groups) for block in some.blocks]
        assert kept == [(block.prefix, block.sent, block.device_rows, block.groups) for block in again.blocks]
        assert some.forecast.peak_bytes <= budget


@pytest.mark.parametrize(
    ("profile", "settings", "said"),
    [
        (llama_profile(), {"budget": "1GiB"}, True),
        (tried(llama_profile()), {"budget": "1GiB"}, False),
        (llama_profile(), {"budget": "1GiB", "policy": "replay"}, False),
        (llama_profile(), {"budget": "1GiB", "keep_last": 1}, False),
    ],
    ids=["untried", "tried", "replay", "keep_last"],
)
def test_a_refusal_that_knows_nothing_of_tiles_says_so(profile, settings, said):
    with pytest.raises(PlanInfeasibleError) as refused:
        plan(profile, **settings)
    assert ("replay alone: by tiles (policy='tiled') less may be enough" in str(refused.value)) == said
