"""Tiles on CUDA: the fused kernels' own operators, sums in float32, compiled programs."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import memo_runtime as memo
from benchmarks.harness.memory import host_facts
from memo_runtime.blocks.call import BlockCall
from memo_runtime.execution.compilers import compiled, run_eagerly
from memo_runtime.execution.mixers.attention import Inputs, Settings, attention_backward, attention_forward
from memo_runtime.execution.stash import Tools
from memo_runtime.execution.tiled import TiledBlock, Way
from memo_runtime.execution.tiled_cache import ProgramCache
from memo_runtime.execution.tiled_gradients import Gradients
from memo_runtime.execution.tiled_programs import accumulate
from memo_runtime.execution.tiled_swap import TiledSwap
from memo_runtime.records import Executor
from tests.exactness.hand_written import WIDTH, Attention
from tests.execution import test_tiled_declared as declared
from tests.execution.tiles import call_of, run, worst
from tests.gpu.late_copies import make_copies_late
from tests.gpu.models import batch, error, llama, llama_and_float32, step

pytestmark = pytest.mark.gpu

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "rows": SDPBackend.MATH,
}


def heads(count, *, tokens=300, depth=64):
    made = torch.randn(2, tokens, count, depth, device="cuda", dtype=torch.bfloat16)
    return made.transpose(1, 2).detach().requires_grad_()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_two_halves_of_attention_are_those_of_autograd(name, causal, masked):
    if masked and (causal or name in ("cudnn", "flash")):
        pytest.skip("masks go to the memory-efficient kernel, and are not causal as well")
    torch.manual_seed(0)
    query, key, value = heads(8), heads(2), heads(2)
    mask = torch.rand(2, 1, 300, 300, device="cuda") > 0.2 if masked else None
    wide = [part.double().detach().requires_grad_() for part in (query, key, value)]
    expected = scaled_dot_product_attention(*wide, mask, is_causal=causal, enable_gqa=True)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, wide, grad)
    settings = Settings(dropout=0.0, causal=causal, scale=64**-0.5, grouped=True)
    inputs = Inputs(query.detach(), key.detach(), value.detach(), mask)
    with sdpa_kernel([BACKENDS[name]]):
        output, saved = attention_forward(inputs, settings, seed=0)
    assert saved.kernel.name == name
    grads = attention_backward(grad.bfloat16(), inputs, output, saved, settings)
    assert worst([output], [expected]) < 1e-2
    assert worst(grads[:3], expected_grads) < 2e-2


@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_16_bit_factors_are_summed_in_float32(transposed):
    torch.manual_seed(0)
    left = torch.randn(96, 512, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(512, 160, device="cuda", dtype=torch.bfloat16)
    product = left.double() @ right.double()
    product = product.t() if transposed else product
    total = torch.full(product.shape, float("nan"), device="cuda")
    for number in range(64):
        accumulate(total, left, right, transposed=transposed, first=number == 0)
    assert worst([total], [64 * product]) < 1e-5


@pytest.mark.parametrize("compiler", [run_eagerly, compiled])
@pytest.mark.parametrize(("alpha", "tile"), [(0.0, 256), (0.5, 256), (1.0, 1000)])
def test_a_block_in_bfloat16(compiler, alpha, tile):
    torch.manual_seed(0)
    block = Attention().cuda().bfloat16()
    reference = Attention().cuda().double()
    reference.load_state_dict(block.state_dict())
    x = torch.randn(2, 1000, WIDTH, device="cuda").bfloat16().requires_grad_()
    exact = run(call_of(reference, x.detach().double().requires_grad_()), reference)
    theirs = run(call_of(block, x), block)
    programs = ProgramCache(compiler)
    tiled = TiledBlock(block, tile=tile, alpha=alpha, programs=programs)
    mine = run(call_of(block, x), tiled)
    for ours, plain, true in zip(mine, theirs, exact, strict=True):
        assert worst(ours, true) <= 1.5 * worst(plain, true)
    count = len(programs)
    run(call_of(block, x), tiled)
    assert len(programs) == count


def test_swapped_blocks_have_the_gradients_of_blocks_that_stay():
    """Streams run freely, and memory that is freed too early is taken by the next block."""
    torch.manual_seed(0)
    blocks = [Attention().cuda().bfloat16() for _ in range(5)]
    x = torch.randn(2, 16384, WIDTH, device="cuda").bfloat16().requires_grad_()
    device = torch.device("cuda")
    wanted = [x, *(one for block in blocks for one in block.parameters())]

    def step(swap):
        hidden = x * 1
        for block in blocks:
            hidden = TiledBlock(block, tile=4096, swap=swap)(hidden)
        return [hidden], torch.autograd.grad(hidden.float().square().mean(), wanted)

    expected = step(None)
    tools = Tools(device, 1 << 30)
    swap = TiledSwap(device, tools.pool, tools.engine)
    for _ in range(5):
        found = step(swap)
        assert worst(found[0], expected[0]) < 1e-2
        assert worst(found[1], expected[1]) < 2e-2
    torch.cuda.synchronize()
    assert swap.pool.in_use == 0
    assert swap.transfer.open_copies == 0


def test_products_in_host_memory_are_those_that_stay_bit_for_bit(monkeypatch):
    """The copy streams are late by random times, and memory that is freed too early is taken by the next tile."""
    torch.manual_seed(0)
    blocks = [Attention().cuda().bfloat16() for _ in range(4)]
    x = torch.randn(2, 16384, WIDTH, device="cuda").bfloat16().requires_grad_()
    device = torch.device("cuda")
    wanted = [x, *(one for block in blocks for one in block.parameters())]
    tools = Tools(device, 1 << 30)
    swap = TiledSwap(device, tools.pool, tools.engine)
    make_copies_late(tools, monkeypatch)
    tiles = [TiledBlock(block, tile=1024) for block in blocks]

    def step(sent):
        hidden = x * 1
        for one in tiles:
            call = BlockCall.of((hidden,), {})
            hidden = one.run(one.captured(call), call, Way(tile=1024, alpha=1.0, swap=swap, sent=sent))
            del call
        return torch.autograd.grad(hidden.float().square().mean(), wanted)

    # Without ``warn_only``: flash attention's backward repeats its bits only then.
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            expected = step(0)
            for sent in (0, 16, 15, 16, 1, 16):
                assert all(torch.equal(a, b) for a, b in zip(step(sent), expected, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()
    assert (tools.pool.in_use, tools.engine.open_copies) == (0, 0)


def test_a_budget_that_needs_products_in_host_memory_is_kept():
    """Products that do not fit on the device go to the host; the plan's bytes are the step's, and so is its peak."""
    model, data = llama(torch.bfloat16, hidden=2048), batch(1, 16384)
    profile = memo.profile(model, data, tiles=True)
    least = memo.plan(profile, policy="tiled", alpha=0.0, keep_last=1, tile=1024).forecast.peak_bytes
    most = memo.plan(profile, policy="tiled", alpha=1.0, keep_last=4, tile=1024).forecast.peak_bytes
    budget = least + (most - least) // 3
    plan = memo.plan(profile, policy="tiled", alpha=1.0, keep_last=1, tile=1024, budget=budget)
    assert [block.sent > 0 for block in plan.blocks] == [True] * 3 + [False]
    memo.wrap(model, plan=plan)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        model(**data).loss.backward()
        model.zero_grad(set_to_none=True)
    report = memo.report(model)
    print(plan, report, sep="\n")
    totals, forecast = report.totals, report.totals.forecast
    for name in ("bytes_to_host", "bytes_to_device", "bytes_kept", "recomputed_flops", "host_bytes"):
        assert getattr(totals, name) == getattr(forecast, name), name
    assert totals.peak_bytes <= budget
    assert totals.peak_bytes <= 1.03 * forecast.peak_bytes


def test_gradients_of_inputs_take_the_place_of_those_of_results(monkeypatch):
    """The count of a gradient's holders is that of this device's thread of autograd."""
    placed = []
    original = Gradients.place
    monkeypatch.setattr(Gradients, "place", lambda self, *args: (placed.append(1), original(self, *args)))
    block = Attention().cuda().bfloat16()
    tiled = TiledBlock(block, tile=256)
    for forward, count in ((tiled, 2), (block, 2)):
        x = torch.randn(1, 1000, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        (forward(forward(x)) * 3).sum().backward()
        assert len(placed) == count


def test_auto_takes_tiles_where_replay_is_slower_or_does_not_fit():
    """The budget is kept, and where nothing runs beside this test, the step takes what compiled tiles were said to."""
    model, data = llama(torch.bfloat16, hidden=2048), batch(1, 16384)
    profile = memo.profile(model, data, tiles=True)
    least = memo.plan(profile, policy="tiled", alpha=0.0, keep_last=0, tile=2048).forecast.peak_bytes
    budget = (least + memo.plan(profile, policy="recompute", keep_last=0).forecast.peak_bytes) // 2
    memo.wrap(model, budget=budget)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        model(**data).loss.backward()
        model.zero_grad(set_to_none=True)
    report = memo.report(model)
    print(report)
    assert {block.executor for block in report.blocks} == {Executor.TILED}
    totals = report.totals
    assert totals.peak_bytes <= budget
    if "PYTEST_XDIST_WORKER" not in os.environ:
        assert totals.step_seconds == pytest.approx(totals.forecast.step_seconds, rel=0.25)


def test_nothing_waits_for_the_device():
    block = Attention().cuda().bfloat16()
    x = torch.randn(1, 1000, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    tiled = TiledBlock(block, tile=256)
    tiled(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tiled(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("budget_share", [None, 0.5])
def test_a_model_by_tiles_in_bfloat16(budget_share):
    """Gradients against float32's, the peak against the budget and the forecast, host bytes and FLOPs to the byte."""
    data = batch(1, 8192)
    model, exact, plain = llama_and_float32(data, hidden=1024)
    profile = memo.profile(model, data, tiles=True)
    # Between a stash that all stays and one of which nothing does: some of it has to go to the host.
    most = memo.plan(profile, policy="tiled", alpha=0.0, keep_last=4, tile=2048).forecast.peak_bytes
    least = memo.plan(profile, policy="tiled", alpha=0.0, keep_last=0, tile=2048).forecast.peak_bytes
    budget = None if budget_share is None else int(least + budget_share * (most - least))
    memo.wrap(model, policy="tiled", tile=2048, budget=budget)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        gradients = step(model, data)[1]
        model.zero_grad(set_to_none=True)
    report = memo.report(model)
    assert {block.executor for block in report.blocks} == {Executor.TILED}
    assert error(gradients, exact) <= 1.1 * plain
    totals, forecast = report.totals, report.totals.forecast
    for name in ("bytes_to_host", "bytes_to_device", "bytes_kept", "recomputed_flops", "host_bytes"):
        assert getattr(totals, name) == getattr(forecast, name), name
    if budget is not None:
        assert totals.peak_bytes <= budget
        assert totals.bytes_to_host > 0
    # Gradients of the step before the last were cloned by ``step``: they are not the step's own.
    assert totals.peak_bytes <= 1.05 * forecast.peak_bytes + sum(g.numel() * g.element_size() for g in exact.values())


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_a_declared_module_in_compiled_programs(drop):
    """Routed experts between compiled operators; with dropout, compiled and eager programs drop the same."""
    torch.manual_seed(0)
    block = declared.Around(declared.Experts(drop=drop), first=True).cuda()
    memo.token_wise(block.inner)
    x = torch.randn(2, 300, WIDTH, device="cuda", requires_grad=True)
    results = []
    for programs in (ProgramCache(compiled), ProgramCache(run_eagerly)):
        torch.manual_seed(1)
        results.append(run(call_of(block, x), TiledBlock(block, tile=150, alpha=0.5, programs=programs)))
    expected = results[1] if drop else run(call_of(block, x), block)
    for mine, theirs in zip(results[0], expected, strict=True):
        assert worst(mine, theirs) < 1e-3


def test_tuning_leaves_no_pinned_memory_behind():
    """Where no room is left beside the peak, PyTorch's tuner copies what a kernel writes to into pinned memory."""
    torch.manual_seed(0)
    block = Attention().cuda().bfloat16()
    x = torch.randn(1, 1111, WIDTH, device="cuda").bfloat16().requires_grad_()
    torch._C._host_emptyCache()
    before = host_facts(x.device)["pinned_bytes"]
    torch.cuda.reset_peak_memory_stats()
    run(call_of(block, x), TiledBlock(block, tile=333, programs=ProgramCache(compiled)))
    assert host_facts(x.device)["pinned_bytes"] == before
