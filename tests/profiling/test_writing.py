"""What a rerun on a token slice writes behind the fetched rows is timed, and counts where there are some."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import memo_runtime as memo
from memo_runtime.planning.footprint import rerun_seconds
from memo_runtime.profiling import timing
from memo_runtime.profiling.writing import writing, written_bytes
from memo_runtime.records import Action, BlockProfile, Executor, Growth
from tests.api.towers import signal, tower


@pytest.fixture(scope="module")
def profile() -> BlockProfile:
    return memo.profile(tower(), signal(tokens=64)).blocks[0]


def test_what_is_written_is_what_the_plan_splits(profile: BlockProfile) -> None:
    """Two rows of 64 tokens of float64: norms, the projections between, and the MLP's two hidden states."""
    plan = memo.plan(memo.profile(tower(), signal(tokens=64)), policy="memo", alpha=0.5, keep_last=0).blocks[0]
    split = [
        group.size.at(64)
        for group, action in zip(profile.groups, plan.actions, strict=True)
        if action is Action.PREFIX
    ]
    assert sorted(written_bytes(profile, 64)) == sorted(split) != []
    assert written_bytes(profile, 128) == [2 * size for size in written_bytes(profile, 64)]


def test_each_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    inner = torch.Tensor.copy_

    def watched(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        copied.append(target.numel())
        return inner(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", watched)
    writing([100, 300, 100], torch.device("cpu"))()
    assert copied == [100, 300, 100]


def test_it_is_timed_apart_from_the_rerun(profile: BlockProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert profile.write_seconds.exact(64) > 0
    monkeypatch.setattr(timing._Timer, "_write", lambda timer, tokens: tokens * 1e-3)
    again = memo.profile(tower(), signal(tokens=64)).blocks[0]
    assert again.write_seconds.exact(40) == pytest.approx(40e-3)
    assert again.rerun_seconds.exact(40) < 40e-3


def test_it_counts_behind_a_prefix(profile: BlockProfile) -> None:
    block = replace(profile, rerun_seconds=Growth(linear=1.0), write_seconds=Growth(linear=0.25))
    whole = memo.plan(memo.profile(tower(), signal(tokens=64)), policy="recompute", keep_last=0).blocks[0]
    assert whole.executor is Executor.REPLAY
    assert rerun_seconds(block, whole) == 64
    assert rerun_seconds(block, replace(whole, prefix=24)) == 40 * 1.25
    assert rerun_seconds(block, replace(whole, prefix=64)) == 0
