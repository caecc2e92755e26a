"""``auto`` takes tiles where replay does not fit, is exact with them, and leaves other models alone."""

from __future__ import annotations

import copy
import re

import pytest
import torch

import memo_runtime as memo
from memo_runtime.errors import PlanInfeasibleError
from memo_runtime.execution.tiled_block import Tiling
from memo_runtime.records import Executor, Profile
from tests.capture.blocks import StraightThrough
from tests.exactness import hand_written
from tests.exactness.compare import assert_clean, assert_trade, output_loss, run_step
from tests.exactness.test_tiled import assert_close, batch_of, stack

TOKENS = 64


def floors(profile: Profile) -> tuple[int, int]:
    """Least device bytes (by tiles, by replay)."""
    tiles = memo.plan(profile, policy="tiled", alpha=0.0, keep_last=0)
    return tiles.floor_bytes, memo.plan(profile, policy="recompute", keep_last=0).floor_bytes


def test_tiles_where_replay_does_not_fit():
    model, batch = stack(hand_written.Attention, hand_written.Attention), batch_of(TOKENS)
    want = run_step(model, batch, output_loss)
    by_tiles, by_replay = floors(memo.profile(model, batch, tiles=True))
    assert by_tiles < by_replay
    budget = by_replay - 1
    plain = copy.deepcopy(model)
    memo.wrap(model, budget=budget, loss="native")
    for _ in range(2):
        assert_close(run_step(model, batch, output_loss), want)
    report = memo.report(model)
    assert {block.executor for block in report.blocks} == {Executor.TILED}
    assert "blocks run by tiles: replay does not fit" in report.notes
    assert report.totals.peak_bytes == report.totals.forecast.peak_bytes <= budget
    assert_trade(model)
    # Too long a sequence is refused with one that fits; what tiles take is known by now.
    one = batch_of(TOKENS, rows=1)
    assert_close(run_step(model, one, output_loss), run_step(plain, one, output_loss))
    assert memo.report(model).blocks[0].executor is Executor.KEEP
    with pytest.raises(PlanInfeasibleError, match="tokens instead of 2,048") as error:
        model(**batch_of(2048))
    fits = re.search(r"(\d+) tokens instead of 2,048", str(error.value))
    assert fits is not None
    longest = batch_of(int(fits[1]))
    assert_close(run_step(model, longest, output_loss), run_step(plain, longest, output_loss))
    assert {block.executor for block in memo.report(model).blocks} == {Executor.TILED}
    assert_clean(model)


def test_a_batch_of_other_rows_is_looked_at_by_tiles_and_serves_the_first_one():
    """Tiles are tried at three sequences, after a profile of one; what was seen is that of one, three times."""
    model = stack(hand_written.Attention, hand_written.Attention)
    plain = copy.deepcopy(model)
    small, large = batch_of(TOKENS, rows=1), batch_of(TOKENS)
    _, by_replay = floors(memo.profile(plain, large, tiles=True))
    memo.wrap(model, budget=by_replay - 1, loss="native")
    run_step(model, small, output_loss)
    assert memo.report(model).blocks[0].executor is Executor.KEEP
    assert_close(run_step(model, large, output_loss), run_step(plain, large, output_loss))
    assert memo.report(model).blocks[0].executor is Executor.TILED
    assert_trade(model)


def test_nobody_looks_at_tiles_where_replay_fits(monkeypatch):
    monkeypatch.setattr(Tiling, "see", None)  # a call would raise
    monkeypatch.setattr(torch, "compile", None)
    for settings in ({}, {"budget": "1GiB"}):
        model = memo.wrap(stack(), **settings)
        run_step(model, batch_of(), output_loss)
        assert not any("tiles" in note for note in memo.report(model).notes)


def test_a_block_that_refuses_is_named_and_replayed():
    model, batch = stack(hand_written.Attention, StraightThrough), batch_of(TOKENS)
    want = run_step(model, batch, output_loss)
    profile = memo.profile(model, batch, tiles=True, blocks=list(model.blocks))
    memo.wrap(model, plan=memo.plan(profile, policy="tiled", alpha=0.0), loss="native", blocks=list(model.blocks))
    assert_close(run_step(model, batch, output_loss), want)
    notes = memo.plan(profile, budget="1GiB", strict=True).notes
    assert any("'blocks.1' cannot run by tiles: autograd.Function 'Round'" in note for note in notes)
