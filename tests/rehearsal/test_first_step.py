"""A long step is rehearsed once: what happens once happens on a few tiles, under the plan of the whole."""

import pytest
import torch

import memo_runtime as memo
from memo_runtime.errors import ArgumentError, ArgumentTypeError
from memo_runtime.lookup import find_wrapped
from memo_runtime.rehearsal.first_step import check_short, few_tokens, under_plan
from memo_runtime.rehearsal.planned import without_plan
from tests.api.towers import tower

TOKENS = 1000
WAYS = {
    "memo": {"policy": "memo", "alpha": 0.4},
    "recompute": {"policy": "recompute"},
    "tiled": {"policy": "tiled", "alpha": 0.5, "tile": 32},
    # Inputs made again from the block below, one after another.
    "chained": {"policy": "tiled", "tile": 32, "budget": "3MiB", "host_budget": "2500KiB"},
}


def mean_square(output):
    return output.square().mean()


def batch(tokens=TOKENS):
    return torch.randn(2, tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def rehearsed(way, **settings):
    """(the rehearsal, lengths of its steps) of a tower with an optimizer that has no state yet."""
    model = memo.wrap(tower(), keep_last=0, **WAYS[way])
    lengths = []

    def loss(output):
        lengths.append(output.shape[1])
        return mean_square(output)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    found = memo.rehearse(model, batch(), loss=loss, optimizer=optimizer, **settings)
    assert (way == "chained") == any(block.from_below for block in find_wrapped(model).session.plan.blocks)
    return found, lengths


#: By tiles in a chain too, and kept products are told in test_rehearse.py.
@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow if way == "tiled" else ()) for way in WAYS])
def test_one_whole_step_shows_what_two_do(way, monkeypatch):
    monkeypatch.setattr("memo_runtime.rehearsal.first_step._TOKENS", 64)
    twice, whole = rehearsed(way)
    once, lengths = rehearsed(way, shorter=batch)
    tile = 32 if way in ("tiled", "chained") else 64
    few = 3 * tile + TOKENS % tile
    assert whole == [TOKENS, TOKENS]
    assert lengths == [few, TOKENS]
    assert once.fits
    assert once.peak_bytes == pytest.approx(twice.peak_bytes, rel=0.002)
    assert (once.replaced, once.bytes_to_host, once.bytes_to_device) == (
        twice.replaced, twice.bytes_to_host, twice.bytes_to_device
    )  # fmt: skip
    assert once.host_bytes == twice.host_bytes


def test_where_none_is_short_two_whole_steps_are_taken():
    _, lengths = rehearsed("recompute", shorter=batch)
    assert lengths == [TOKENS, TOKENS]
    with pytest.raises(ArgumentTypeError, match="shorter=3 is no function from a number of tokens to a batch"):
        memo.rehearse(tower(), batch(), loss=mean_square, shorter=3)


def test_a_shorter_batch_of_another_length_is_refused(monkeypatch):
    monkeypatch.setattr("memo_runtime.rehearsal.first_step._TOKENS", 64)
    few = 3 * 64 + TOKENS % 64
    expected = (
        rf"shorter= was asked for a batch of {few} tokens, as the whole one is of 1,000: tensors of shapes "
        rf"\[\[2, 1000, 8\]\] came as \[\[2, {few - 3}, 8\]\]"
    )
    with pytest.raises(ArgumentError, match=expected):
        rehearsed("recompute", shorter=lambda tokens: batch(tokens - 3))


def test_a_dimension_that_is_as_long_as_the_sequence_may_stay():
    whole, other = torch.empty(1, 64, 64), torch.empty(5)
    check_short((torch.empty(1, 8, 64), other), (whole, other), 8, 64)
    with pytest.raises(ArgumentError):
        check_short((whole, other), (whole, other), 8, 64)
    check_short((torch.empty(1, 3, 16, 8),), (torch.empty(1, 3, 32, 32),), 8, 64)  # patches of 4 x 4


def test_the_plan_of_the_whole_is_that_of_the_short_step_and_of_no_later_one():
    model = memo.wrap(tower(), keep_last=0, **WAYS["tiled"])
    wrapped = find_wrapped(model)
    args = (batch(),)
    plan = wrapped.plan_for(args, {})
    assert wrapped.session.plan is None
    assert wrapped.plan_for(args, {}) is plan, "it is made once"
    wrapped.before_forward(args, {})
    assert wrapped.session.plan is plan
    few = few_tokens(plan)
    assert few % 32 == TOKENS % 32
    with under_plan(wrapped):
        mean_square(model(batch(few))).backward()
    assert wrapped.session.plan is plan
    model.zero_grad(set_to_none=True)
    mean_square(model(batch(few + 32))).backward()
    assert wrapped.session.plan.seq_len == few + 32


def test_a_refused_plan_is_told_by_a_rehearsal_that_would_begin_with_a_few_tiles():
    model = memo.wrap(tower(), policy="swap", keep_last=0, host_budget="32KiB")
    found = memo.rehearse(model, batch(), loss=mean_square, shorter=batch)
    assert (found.fits, found.phase, found.where) == (False, "plan", "none fits")


def test_a_plan_that_the_system_has_no_host_memory_for_is_none(monkeypatch):
    model = memo.wrap(tower(), policy="swap", keep_last=0)
    assert without_plan(model, (batch(),), {}) is None
    pool = find_wrapped(model).session.tools.pool
    assert pool.reserved == 0
    monkeypatch.setattr(pool, "_within_cgroup", lambda size: (0, "3.00 MiB of 64.00 MiB are left by cgroup v2"))
    found = without_plan(model, (batch(),), {})
    assert (found.fits, found.phase, found.where) == (False, "plan", "its host memory")
    assert found.error.endswith("of host memory cannot be had: 3.00 MiB of 64.00 MiB are left by cgroup v2")
    monkeypatch.undo()
    mean_square(model(batch())).backward()
    monkeypatch.setattr(pool, "_within_cgroup", lambda size: (0, "nothing is left"))
    assert without_plan(model, (batch(),), {}) is None, "what is there is there"
