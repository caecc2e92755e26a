"""Queries, keys and values that stay on the device: the same gradients to the bit, the trade to the byte."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.errors import PlanFileError
from memo_runtime.execution import tiled_mixing
from memo_runtime.persist import load_plan, save
from memo_runtime.records import Growth, Plan, Profile
from tests.exactness import hand_written
from tests.exactness.compare import TOLERANCE, assert_clean, assert_trade, output_loss, relative_error, run_step
from tests.exactness.test_tiled import assert_close, batch_of, failing_second, stack


@cache
def profiled(*kinds: type[nn.Module]) -> Profile:
    return memo.profile(stack(*kinds).eval(), batch_of(), tiles=True)


def planned(*kinds: type[nn.Module], **how: Any) -> Plan:
    return memo.plan(profiled(*kinds), policy="tiled", tile=5, **how)


def wrapped(model: nn.Module, plan: Plan) -> nn.Module:
    memo.wrap(model, plan=plan, loss="native")
    return model


KINDS = (hand_written.TwoMixers,)
MORE = (hand_written.Attention, hand_written.EagerAttention, hand_written.BufferedMask, hand_written.NoMixer)


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(one, marks=pytest.mark.slow) for one in MORE)])
def test_gradients_and_the_trade(kind):
    """17 tokens in tiles that do not divide them, three sequences; nothing is run again."""
    kinds = (kind, kind)
    model = stack(*kinds).eval()
    plain, beside = copy.deepcopy(model), copy.deepcopy(model)
    want = run_step(plain, batch_of(), output_loss)
    plan, without = planned(*kinds), planned(*kinds, alpha=1.0)
    mixes = kind is not hand_written.NoMixer
    assert [block.mixer_inputs for block in plan.blocks] == [mixes, mixes]
    assert not any(block.mixer_inputs for block in without.blocks)
    wrapped(model, plan), wrapped(beside, without)
    for _ in range(2):
        found, same = (run_step(one, batch_of(), output_loss) for one in (model, beside))
        assert_close(found, want)
        assert all(torch.equal(found.gradients[name], grad) for name, grad in same.gradients.items())
    assert_trade(model)
    totals, others = memo.report(model).totals, memo.report(beside).totals
    assert totals.stash_peak_bytes <= totals.forecast.stash_peak_bytes <= 1.03 * totals.stash_peak_bytes
    assert (totals.recomputed_flops < others.recomputed_flops) is mixes
    assert (totals.bytes_kept > others.bytes_kept) is mixes
    assert_clean(model)


def test_a_graph_that_is_kept_and_accumulation():
    model = stack()
    want = run_step(copy.deepcopy(model), batch_of(), output_loss)
    wrapped(model, planned(*[hand_written.Attention] * 2))
    loss = output_loss(model, batch_of())
    loss.backward(retain_graph=True)
    loss.backward()
    output_loss(model, batch_of()).backward()
    found = {name: parameter.grad / 3 for name, parameter in model.named_parameters()}
    assert relative_error(found, want.gradients) <= TOLERANCE
    model.zero_grad()
    assert_clean(model)  # though the losses are still there


@pytest.mark.parametrize("name", ["attention_forward", "attention_backward"])
def test_an_error_in_the_middle_of_a_block(name, monkeypatch):
    model = stack()
    want = run_step(copy.deepcopy(model), batch_of(), output_loss)
    wrapped(model, planned(*[hand_written.Attention] * 2))
    with monkeypatch.context() as patch:
        patch.setattr(tiled_mixing, name, failing_second(getattr(tiled_mixing, name), RuntimeError))
        with pytest.raises(RuntimeError):
            run_step(model, batch_of(), output_loss)
    model.zero_grad()
    assert_clean(model)
    assert_close(run_step(model, batch_of(), output_loss), want)
    assert_trade(model)


def test_they_stay_where_there_is_room_from_the_last_block_on():
    kinds = (hand_written.Attention,) * 3
    every = planned(*kinds)
    assert [block.mixer_inputs for block in every.blocks] == [True] * 3
    low = planned(*kinds, alpha=1.0, keep_last=3).forecast.peak_bytes
    some = planned(*kinds, budget=(low + every.forecast.peak_bytes) // 2)
    assert some.forecast.peak_bytes <= some.limits.device_bytes
    assert [block.mixer_inputs for block in some.blocks] in ([False, True, True], [False, False, True])
    assert all(block.alpha == 1.0 for block in some.blocks)
    model = stack(*kinds).eval()
    want = run_step(copy.deepcopy(model), batch_of(), output_loss)
    wrapped(model, some)
    assert_close(run_step(model, batch_of(), output_loss), want)
    assert_trade(model)
    assert not any(block.mixer_inputs for block in planned(*kinds, alpha=1.0).blocks)
    assert not any(block.mixer_inputs for block in planned(*kinds, alpha=0.0).blocks)


def test_nothing_stays_of_a_block_that_does_not_go_backward():
    model = stack().eval()
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    plain = copy.deepcopy(model)
    plan = memo.plan(memo.profile(model, batch_of(), tiles=True), policy="tiled", tile=5, keep_last=0)
    first = plan.blocks[0]
    assert [block.mixer_inputs for block in plan.blocks] == [False, True]
    assert first.recomputed_flops == first.bytes_kept == first.bytes_to_host == first.host_bytes == 0
    assert plan.profile.blocks[0].tiled.again_flops == Growth()
    found = run_step(wrapped(model, plan), batch_of(), output_loss)
    assert_close(found, run_step(plain, batch_of(), output_loss))
    assert_trade(model)
    totals = memo.report(model).totals
    assert totals.stash_peak_bytes <= totals.forecast.stash_peak_bytes <= 1.03 * totals.stash_peak_bytes
    assert_clean(model)


class YieldsKeys(hand_written.Attention):
    """Yields a part of what its attention is given beside its result."""

    def forward(self, x: torch.Tensor) -> Any:
        query, key, value = self.heads(x)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.finish(x, hand_written.merge_heads(mixed)), None, (key, value)


def test_a_block_that_yields_its_keys_makes_them_again():
    model = stack(YieldsKeys, YieldsKeys).eval()
    want = run_step(copy.deepcopy(model), batch_of(), output_loss)
    plan = planned(YieldsKeys, YieldsKeys)
    assert not any(block.mixer_inputs for block in plan.blocks)
    assert_close(run_step(wrapped(model, plan), batch_of(), output_loss), want)
    assert_trade(model)


def test_what_is_beside_groups_or_not_by_tiles_is_refused(tmp_path):
    plan = planned(*[hand_written.Attention] * 2)
    path = tmp_path / "plan.json"
    for wrong in ({"groups": 2}, {"late": True}):
        block = replace(plan.blocks[0], **wrong)
        save(replace(plan, blocks=(block, *plan.blocks[1:])), path)
        with pytest.raises(PlanFileError, match=r"mixer_inputs|groups"):
            load_plan(path)
    save(plan, path)
    assert load_plan(path) == plan
