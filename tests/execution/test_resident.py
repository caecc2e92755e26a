"""A block whose input and mixer results stay on the device and whose rest is rebuilt, as planned on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import memo_runtime as memo
from memo_runtime.planning.actions import RESIDENT_ROLES, plan_block
from memo_runtime.records import Executor
from tests.exactness.models import FAMILIES, text


def run(model, data):
    model.zero_grad(set_to_none=True)
    loss = model(**data).loss
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("prefix", [0, 8])
def test_a_resident_block_copies_less_and_computes_the_same(prefix):
    model, data = FAMILIES["llama"].make(), text(rows=2, tokens=21)
    plain = run(model, data)
    profile = memo.profile(model, data)
    plan = memo.plan(profile, policy="recompute", keep_last=0)
    last = plan_block(profile.blocks[-1], Executor.REPLAY, 21, prefix, resident=True)
    memo.wrap(model, plan=replace(plan, blocks=(*plan.blocks[:-1], last)))
    for _ in range(2):
        gradients = run(model, data)
        assert all(torch.allclose(gradients[name], plain[name], rtol=1e-11, atol=1e-13) for name in plain)
    done = memo.report(model).blocks[-1]
    assert (done.bytes_to_host, done.bytes_to_device, done.bytes_kept) == (last.bytes_to_host,) * 2 + (last.bytes_kept,)
    assert done.recomputed_flops == last.recomputed_flops > 0
    assert done.bytes_kept > plan.blocks[-1].bytes_to_host // 2
    totals = memo.report(model).totals
    assert (totals.stash_bytes, totals.host_bytes_in_use, totals.open_copies) == (0, 0, 0)


def test_what_is_too_small_to_be_moved_is_never_held_twice():
    """Attention's log-sum-exp, under 1 KiB, stays where it was saved."""
    model, data = FAMILIES["llama"].make(num_hidden_layers=1), text(rows=1, tokens=21)
    memo.wrap(model, policy="swap", keep_last=0, blocks="model.layers.0")
    run(model, data)
    totals = memo.report(model).totals
    assert totals.bytes_kept > 0
    assert totals.stash_peak_bytes == totals.forecast.stash_peak_bytes
    groups = model._memo.session.plan.profile.blocks[0].groups
    saved = sum(group.size.at(21) for group in groups if group.saved and group.role not in RESIDENT_ROLES)
    assert totals.stash_peak_bytes == saved
