"""Products of tiles in host memory: gradients of the model as it is, and to the bit those of products that stay."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.errors import HostLimitError, PlanFileError
from memo_runtime.execution import tiled_mixing
from memo_runtime.execution.tiled_products import Products
from memo_runtime.persist import load_plan, save
from memo_runtime.planning.sheet import Sheet
from memo_runtime.planning.tiles import by_tiles
from memo_runtime.records import Executor, Plan, Profile
from memo_runtime.reporting.lanes import lanes_of
from tests.exactness import hand_written
from tests.exactness.compare import TOLERANCE, assert_clean, assert_trade, output_loss, relative_error, run_step
from tests.exactness.test_tiled import assert_close, batch_of, failing_second, stack


def sending(profile: Profile, *, alpha: float = 1.0, keep_last: int = 0, tile: int = 5, stays: int = 0) -> Plan:
    """A plan whose blocks below the last ones send their products, but for those of the first ``stays`` tiles."""
    plan = memo.plan(profile, policy="tiled", tile=tile, alpha=alpha, keep_last=keep_last)
    sheet = Sheet(profile, tuple(block.tokens for block in plan.blocks))
    choices = tuple(
        replace(one, sent=max(0, one.sent - stays * tile))
        for one in by_tiles(sheet, alpha, keep_last, tile, sent=alpha)
    )
    return replace(plan, blocks=sheet.plans(choices), forecast=sheet.forecast(choices))


BLOCKS = (hand_written.Attention,) * 2


def staying(plan: Plan) -> Plan:
    """The same with all products on the device."""
    sheet = Sheet(plan.profile, tuple(block.tokens for block in plan.blocks))
    resident = sum(block.device_rows > 0 for block in plan.blocks)
    choices = by_tiles(sheet, plan.alpha or 0.0, resident, plan.blocks[0].tile)
    return replace(plan, blocks=sheet.plans(choices), forecast=sheet.forecast(choices))


@cache
def profiled(*kinds: type[nn.Module]) -> Profile:
    return memo.profile(stack(*kinds).eval(), batch_of(), tiles=True)


def wrapped(model: nn.Module, **how: Any) -> tuple[nn.Module, Plan]:
    plan = sending(profiled(*map(type, model.blocks)), **how)
    memo.wrap(model, plan=plan, loss="native")
    return model, plan


MODELS = [
    ((hand_written.Attention,) * 3, {"keep_last": 1, "alpha": 0.7, "tile": 3}), ((hand_written.TwoMixers,) * 2, {}),
]  # fmt: skip
MORE = [
    ((hand_written.Attention,) * 3, {"tile": 3}), ((hand_written.Attention,) * 2, {"stays": 1}),
    ((hand_written.Attention,) * 2, {"tile": 17}), ((hand_written.NoMixer,) * 3, {"keep_last": 1}),
    ((hand_written.BufferedMask,) * 2, {"tile": 4}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "how"), [*MODELS, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE)], ids=str
)
def test_gradients_and_the_trade(kinds, how):
    """17 tokens in tiles that do not divide them, three sequences."""
    model = stack(*kinds).eval()
    plain, beside = copy.deepcopy(model), copy.deepcopy(model)
    want = run_step(plain, batch_of(), output_loss)
    model, plan = wrapped(model, **how)
    assert sum(block.sent for block in plan.blocks) > 0
    memo.wrap(beside, plan=staying(plan), loss="native")
    for _ in range(2):
        found, same = (run_step(one, batch_of(), output_loss) for one in (model, beside))
        assert_close(found, want)
        assert all(torch.equal(found.gradients[name], grad) for name, grad in same.gradients.items())
    assert_trade(model)
    totals = memo.report(model).totals
    assert totals.host_bytes == totals.forecast.host_bytes
    assert totals.stash_peak_bytes <= totals.forecast.stash_peak_bytes <= 1.03 * totals.stash_peak_bytes
    assert totals.bytes_to_host > memo.report(beside).totals.bytes_to_host
    assert memo.report(model).totals.bytes_kept < memo.report(beside).totals.bytes_kept
    assert_clean(model)


def test_a_graph_that_is_kept_and_accumulation():
    model = stack(*[hand_written.Attention] * 3)
    want = run_step(copy.deepcopy(model), batch_of(), output_loss)
    model, _ = wrapped(model, keep_last=1)
    loss = output_loss(model, batch_of())
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    run_step_again = output_loss(model, batch_of())
    run_step_again.backward()
    found = {name: parameter.grad / 4 for name, parameter in model.named_parameters()}
    assert relative_error(found, want.gradients) <= TOLERANCE
    model.zero_grad()
    assert_clean(model)  # though the losses are still there
    output_loss(model, batch_of())  # no backward
    assert_close(run_step(model, batch_of(), output_loss), want)
    assert_clean(model)


FAILING = [
    (tiled_mixing, "attention_forward"), (tiled_mixing, "attention_backward"),
    (Products, "store"), (Products, "take"), (Products, "over"), (Products, "fetch_first"),
]  # fmt: skip


def test_an_error_in_the_middle_of_a_block(monkeypatch):
    """The step is lost, nothing of it is held, and the next one is as if it had never been."""
    model = stack()
    want = run_step(copy.deepcopy(model), batch_of(), output_loss)
    model, _ = wrapped(model)
    run_step(model, batch_of(), output_loss)
    for number, (place, name) in enumerate(FAILING):
        kind = (RuntimeError, KeyboardInterrupt)[number % 2]
        with monkeypatch.context() as patch:
            failing = failing_first(kind) if name == "fetch_first" else failing_second(getattr(place, name), kind)
            patch.setattr(place, name, failing)
            with pytest.raises(kind):
                run_step(model, batch_of(), output_loss)
        model.zero_grad()
        gc.collect()
        assert_clean(model)
        assert_close(run_step(model, batch_of(), output_loss), want)
        assert_trade(model)


def failing_first(kind: type[BaseException]) -> Any:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise kind("at the first call")

    return failing


def test_a_traceback_that_somebody_keeps_costs_the_next_step_no_host_memory(monkeypatch):
    model = stack()
    plan = sending(profiled(*BLOCKS))
    plan = replace(plan, limits=replace(plan.limits, host_bytes=plan.forecast.host_bytes))
    memo.wrap(model, plan=plan, loss="native")
    run_step(model, batch_of(), output_loss)
    for place, name in FAILING[:4]:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, failing_second(getattr(place, name), RuntimeError))
            with pytest.raises(RuntimeError) as kept:
                run_step(model, batch_of(), output_loss)
        model.zero_grad()
        run_step(model, batch_of(), output_loss)
        assert memo.report(model).totals.host_bytes == plan.forecast.host_bytes, name
        del kept


def test_too_little_host_memory_is_said_before_the_block_is_over():
    model = stack()
    plan = sending(profiled(*BLOCKS))
    least = replace(plan.limits, host_bytes=plan.forecast.host_bytes - 64)
    memo.wrap(model, plan=replace(plan, limits=least), loss="native")
    with pytest.raises(HostLimitError):
        model(**batch_of())


def test_a_plan_file_says_what_is_sent(tmp_path):
    plan = sending(profiled(*BLOCKS))
    path = tmp_path / "plan.json"
    save(plan, path)
    assert load_plan(path) == plan
    assert " sent" in str(plan)
    assert {bar.what for bar in lanes_of(plan)} >= {"copy", "fetch", "products"}
    first = plan.blocks[0]
    for changed, says in (
        ({"sent": 18}, "at most 17, its prefix"), ({"sent": 4}, "17 less a multiple of 5"),
        ({"device_rows": 17}, "its stash stays on the device"),
        ({"executor": Executor.REPLAY}, "does not run by tiles"),
    ):  # fmt: skip
        save(replace(plan, blocks=(replace(first, **changed), *plan.blocks[1:])), path)
        with pytest.raises(PlanFileError, match=says):
            load_plan(path)
