"""Inputs that are made again on CUDA: late copies, late blocks, compiled programs, and a budget that needs them."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import memo_runtime as memo
from memo_runtime.blocks.call import BlockCall
from memo_runtime.execution.stash import Tools
from memo_runtime.execution.tiled import TiledBlock, Way
from memo_runtime.execution.tiled_chain import origin_of
from memo_runtime.execution.tiled_swap import TiledSwap
from tests.exactness.chains import with_runs
from tests.exactness.hand_written import WIDTH, Attention
from tests.gpu.late_copies import make_copies_late
from tests.gpu.models import batch, error, llama, llama_and_float32, step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("late", [False, True])
def test_gradients_are_those_of_inputs_that_are_stashed_bit_for_bit(monkeypatch, late):
    """The copy streams are late by random times, and memory that is freed too early is taken by the next block."""
    torch.manual_seed(0)
    blocks = [Attention().cuda().bfloat16() for _ in range(5)]
    x = torch.randn(2, 16384, WIDTH, device="cuda").bfloat16().requires_grad_()
    device = torch.device("cuda")
    wanted = [x, *(one for block in blocks for one in block.parameters())]
    tools = Tools(device, 1 << 30)
    swap = TiledSwap(device, tools.pool, tools.engine)
    make_copies_late(tools, monkeypatch)
    tiles = [TiledBlock(block, tile=4096) for block in blocks]

    def gradients(every, late=False):
        hidden = x * 1
        for number, one in enumerate(tiles):
            call = BlockCall.of((hidden,), {})
            origin = origin_of(hidden) if number % every else None
            assert (origin is not None) == bool(number % every)
            hidden = one.run(one.captured(call), call, Way(tile=4096, swap=swap, origin=origin, late=late))
            del call, origin
        return torch.autograd.grad(hidden.float().square().mean(), wanted)

    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            expected = gradients(1)
            for every in (*((1,) if late else ()), 2, 4, 2, 8, 4):
                assert all(torch.equal(a, b) for a, b in zip(gradients(every, late), expected, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()
    assert (tools.pool.in_use, tools.engine.open_copies) == (0, 0)


@pytest.mark.parametrize(("every", "late"), [(2, False), (4, False), (1, True), (2, True), (8, True)])
def test_a_model_in_bfloat16(every, late):
    """Gradients against float32's, host bytes and FLOPs to the byte, the peak against its forecast."""
    data = batch(1, 8192)
    model, exact, plain = llama_and_float32(data, hidden=1024, blocks=6)
    profile = memo.profile(model, data, tiles=True)
    whole = memo.plan(profile, policy="tiled", alpha=0.0, keep_last=0, tile=2048)
    plan = with_runs(whole, every, late=late)
    assert sum(block.from_below for block in plan.blocks) == {1: 0, 2: 3, 4: 4, 8: 5}[every]
    assert every == 1 or plan.forecast.host_bytes < whole.forecast.host_bytes
    assert all(block.late is late for block in plan.blocks)
    memo.wrap(model, plan=plan)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        gradients = step(model, data)[1]
        model.zero_grad(set_to_none=True)
    report = memo.report(model)
    print(plan, report, sep="\n")
    assert error(gradients, exact) <= 1.1 * plain
    totals, forecast = report.totals, report.totals.forecast
    for name in ("bytes_to_host", "bytes_to_device", "bytes_kept", "recomputed_flops", "host_bytes"):
        assert getattr(totals, name) == getattr(forecast, name), name
    # Gradients of the step before the last were cloned by ``step``: they are not the step's own.
    assert totals.peak_bytes <= 1.05 * forecast.peak_bytes + sum(g.numel() * g.element_size() for g in exact.values())


def test_late_blocks_need_less_than_runs_that_are_held():
    """Of eight blocks in a chain one stashes its input: what is on the device at once, by the allocator's word."""
    data, peaks, forecasts = batch(1, 32768), [], []
    for late in (False, True):
        model = llama(torch.bfloat16, hidden=1024, blocks=8)
        whole = memo.plan(memo.profile(model, data, tiles=True), policy="tiled", alpha=0.0, keep_last=0, tile=2048)
        plan = with_runs(whole, 8, late=late)
        memo.wrap(model, plan=plan)
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            torch.cuda.reset_peak_memory_stats()
            model(**data).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
        forecasts.append(plan.forecast.peak_bytes)
        assert memo.report(model).totals.host_bytes == plan.forecast.host_bytes
        del model
        gc.collect()
    print(peaks, forecasts)
    assert all(peak <= 1.03 * forecast for peak, forecast in zip(peaks, forecasts, strict=True))
    assert peaks[0] - peaks[1] >= 0.9 * (forecasts[0] - forecasts[1]) > 0


def test_a_host_budget_that_needs_it_is_kept():
    model, data = llama(torch.bfloat16, hidden=1024, blocks=6), batch(1, 16384)
    profile = memo.profile(model, data, tiles=True)
    whole = memo.plan(profile, policy="tiled", alpha=0.0, keep_last=0, tile=2048)
    room = with_runs(whole, 2).forecast.host_bytes
    memo.wrap(model, policy="tiled", alpha=0.0, keep_last=0, tile=2048, host_budget=room)
    for _ in range(3):
        step(model, data)
    totals = memo.report(model).totals
    assert totals.host_bytes == totals.forecast.host_bytes <= room
