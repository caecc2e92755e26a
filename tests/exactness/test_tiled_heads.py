"""Models by tiles whose attention runs by groups of heads: gradients, the trade to the byte, and what plans say."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest

import memo_runtime as memo
from memo_runtime.errors import PlanFileError
from memo_runtime.persist import load_plan, save
from memo_runtime.planning.sheet import Sheet
from memo_runtime.planning.tiles import by_tiles
from tests.exactness import hand_written
from tests.exactness.compare import assert_clean, assert_trade, output_loss, run_step
from tests.exactness.test_tiled import assert_close, batch_of, stack

KINDS = (hand_written.Attention,) * 2


@cache
def profiled():
    return memo.profile(stack(*KINDS).eval(), batch_of(), tiles=True)


def planned(groups, *, alpha=0.5, sent=0.0):
    plan = memo.plan(profiled(), policy="tiled", tile=8, alpha=alpha, keep_last=1)
    sheet = Sheet(plan.profile, tuple(block.tokens for block in plan.blocks))
    choices = by_tiles(sheet, alpha, 1, 5, sent=sent, groups=groups)
    return replace(plan, blocks=sheet.plans(choices), forecast=sheet.forecast(choices))


@pytest.mark.parametrize(("groups", "sent"), [(2, 1.0), pytest.param(4, 0.0, marks=pytest.mark.slow)])
def test_gradients_and_the_trade(groups, sent):
    model = stack(*KINDS).eval()
    want = run_step(copy.deepcopy(model), batch_of(), output_loss)
    plan = planned(groups, sent=sent)
    memo.wrap(model, plan=plan, loss="native")
    for _ in range(2):
        assert_close(run_step(model, batch_of(), output_loss), want)
    assert_trade(model)
    report = memo.report(model)
    assert report.totals.host_bytes == plan.forecast.host_bytes
    assert report.totals.recomputed_flops > planned(1, sent=sent).forecast.recomputed_flops
    assert report.blocks[0].attention == (f"cpu, {groups} groups",)
    assert_clean(model)


def test_a_plan_file_says_how_heads_and_queries_go(tmp_path):
    plan = planned(2)
    with_chunks = replace(
        plan,
        profile=replace(
            plan.profile,
            blocks=tuple(
                replace(block, tiled=replace(block.tiled, queries=tuple(8 for _ in block.tiled.attention)))
                for block in plan.profile.blocks
            ),
        ),
    )
    save(with_chunks, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == with_chunks
    assert "attention of blocks.0-1: cpu, 2 groups, queries by 8" in str(with_chunks)
    assert "groups" not in str(planned(1))
    model = stack(*KINDS).eval()
    want = run_step(copy.deepcopy(model), batch_of(), output_loss)
    memo.wrap(model, plan=tmp_path / "plan.json", loss="native")
    assert_close(run_step(model, batch_of(), output_loss), want)
    assert memo.report(model).blocks[0].attention == ("cpu, 2 groups, queries by 8",)


@pytest.mark.parametrize(("groups", "says"), [(3, "a number that divides 4"), (0, "1 or more")])
def test_groups_that_cannot_be_are_refused(groups, says, tmp_path):
    plan = planned(2)
    save(replace(plan, blocks=(replace(plan.blocks[0], groups=groups), *plan.blocks[1:])), tmp_path / "plan.json")
    with pytest.raises(PlanFileError, match=says):
        load_plan(tmp_path / "plan.json")
