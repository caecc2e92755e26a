"""Groups of heads and chunks of queries on CUDA: each fused kernel's log-sum-exps, bfloat16, peaks and speed."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import memo_runtime as memo
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.stopwatch import laps
from memo_runtime.execution.mixers.attention import (
    Inputs,
    Kernel,
    Settings,
    attention_backward,
    attention_forward,
    kernels_for,
)
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_profile import tiled_profile
from memo_runtime.planning.actions import plan_block
from memo_runtime.planning.footprint import footprint
from memo_runtime.planning.sheet import Sheet
from memo_runtime.planning.tiles import by_tiles
from memo_runtime.records import BlockProfile, Executor, Link
from tests.execution.test_tiled_heads import Shared, distance
from tests.execution.tiles import call_of, run, worst
from tests.gpu.models import batch, error, llama_and_float32, step

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SETTINGS = Settings(dropout=0.0, causal=True, scale=0.11, grouped=True)


def inputs_of(tokens, *, queries=8, keys=2, depth=64, rows=2):
    torch.manual_seed(0)
    made = (torch.randn(rows, tokens, count, depth, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
            for count in (queries, keys, keys))  # fmt: skip
    return Inputs(*made, None)


@pytest.mark.parametrize("size", [128, 300, 1000])
@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
def test_parts_of_every_kernel_are_merged(name, size):
    """1,100 queries, no multiple of a chunk: result, log-sum-exp and gradients are those of float64."""
    inputs = inputs_of(1100)
    if name not in kernels_for(inputs, SETTINGS):
        pytest.skip(f"{name} does not serve this call here")
    wide = [one.double().requires_grad_() for one in (inputs.query, inputs.key, inputs.value)]
    expected = scaled_dot_product_attention(*wide, is_causal=True, scale=SETTINGS.scale, enable_gqa=True)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, wide, grad)
    results = []
    for queries in (0, size):
        output, saved = attention_forward(inputs, SETTINGS, seed=0, kernel=Kernel(name, queries))
        assert saved.kernel == Kernel(name, queries)
        grads = attention_backward(grad.bfloat16(), inputs, output, saved, SETTINGS)
        results.append((worst([output], [expected]), worst(grads[:3], expected_grads), saved.tensors[0]))
    (whole, whole_grads, lse), (chunks, chunk_grads, merged) = results
    assert merged.shape == lse.shape
    assert chunks <= 1.5 * whole
    assert chunk_grads <= 1.1 * whole_grads
    rows = inputs.query.shape[2]
    torch.testing.assert_close(merged[:, :, :rows], lse[:, :, :rows], rtol=1e-4, atol=1e-4)


class ByGroups(TiledBlock):
    """Tiles of 512 tokens with attention in ``groups`` by ``kernel``."""

    def __init__(self, block, groups, kernel):
        super().__init__(block, tile=512)
        self.groups, self.kernel = groups, kernel

    def way(self):
        return replace(super().way(), groups=self.groups)

    def captured(self, call):
        found = super().captured(call)
        for node in found.attentions:
            self.programs.kernels[found.signature, node.name] = self.kernel
        return found


@pytest.mark.parametrize("kernel", [Kernel("cudnn"), Kernel("cudnn", 500), Kernel("flash", 1024)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradients_in_bfloat16_are_as_near_to_float64s_as_the_blocks_own(groups, kernel):
    ratios = []
    for seed in range(5):
        torch.manual_seed(seed)
        block, exact = Shared(depth=64).to(DEVICE).bfloat16(), Shared(depth=64).to(DEVICE).double()
        exact.load_state_dict(block.state_dict())
        x = torch.randn(2, 2048, block.norm.normalized_shape[0], device=DEVICE).bfloat16()
        calls = [call_of(one, x.to(kind).requires_grad_()) for one, kind in
                 ((exact, torch.float64), (block, torch.bfloat16), (block, torch.bfloat16))]  # fmt: skip
        tiled = ByGroups(block, groups, kernel)
        want, plain, mine = (run(call, forward)[1] for call, forward in
                             zip(calls, (exact.forward, block.forward, tiled), strict=True))  # fmt: skip
        assert tiled.kernels == [kernel.text(groups)]
        ratios.append(distance(mine, want) / distance(plain, want))
    assert statistics.median(ratios) <= 1.1


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_the_peak_is_the_forecast_one_and_falls_with_the_groups(groups):
    """One block of 16 heads of 128 over 65,536 tokens, its stash on the device; what its caller holds is taken off."""
    tokens = 65536
    torch.manual_seed(0)
    block = Shared(heads=16, keys=8, depth=128).to(DEVICE).bfloat16()
    tiled = ByGroups(block, groups, Kernel("cudnn"))
    x = torch.randn(1, tokens, block.norm.normalized_shape[0], device=DEVICE).bfloat16().requires_grad_()
    call = BlockCall.of((x,), {})
    takes = tiled_profile(tiled.captured(call), call, kernels=tiled.programs.kernels)
    gradients = sum(one.numel() * one.element_size() for one in block.parameters())
    profile = BlockProfile(name="", kind="", stack=0, tokens=tokens, token_dim=1, input_leaf=0, tiled=takes,
                           gradients=gradients)  # fmt: skip
    plan = plan_block(profile, Executor.TILED, tokens, 0, tokens, tile=512, groups=groups)
    foreseen = footprint(profile, plan, Link(to_host=1.0, to_device=1.0))
    measured = 0
    for _ in range(2):  # in the first run kernels are chosen and libraries take their workspaces
        block.zero_grad(set_to_none=True)
        x.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = tiled(x) * 1.0
        torch.autograd.backward(y, torch.ones_like(y))
        measured = torch.cuda.max_memory_allocated() - before
        del y
    size = x.numel() * x.element_size()
    # The stash has x, which was there before; beside the block there is y, its product and the product's gradient.
    forecast = foreseen.skeletal + foreseen.backward_peak - size
    assert 0.97 * forecast - size <= measured <= 1.03 * forecast + 3 * size


def test_a_model_whose_heads_go_in_groups():
    """Gradients against float32's, the peak against the forecast, host bytes and FLOPs to the byte."""
    data = batch(1, 8192)
    model, exact, plain = llama_and_float32(data, hidden=1024)
    plan = memo.plan(memo.profile(model, data, tiles=True), policy="tiled", alpha=0.5, keep_last=1, tile=2048)
    sheet = Sheet(plan.profile, tuple(block.tokens for block in plan.blocks))
    choices = by_tiles(sheet, 0.5, 1, 2048, groups=4)
    plan = replace(plan, blocks=sheet.plans(choices), forecast=sheet.forecast(choices))
    memo.wrap(model, plan=plan)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        gradients = step(model, data)[1]
        model.zero_grad(set_to_none=True)
    report = memo.report(model)
    assert all("4 groups" in block.attention[0] for block in report.blocks)
    assert error(gradients, exact) <= 1.1 * plain
    totals, forecast = report.totals, report.totals.forecast
    for name in ("bytes_to_host", "bytes_to_device", "bytes_kept", "recomputed_flops", "host_bytes"):
        assert getattr(totals, name) == getattr(forecast, name), name
    # Gradients of the step before the last were cloned by ``step``: they are not the step's own.
    assert totals.peak_bytes <= 1.05 * forecast.peak_bytes + sum(g.numel() * g.element_size() for g in exact.values())


def test_a_chunked_forward_over_131072_tokens_is_as_fast_as_the_whole(quiet_machine):
    """16 heads of 128 and 8 of keys; longer sequences gain, and the runtime takes chunks only where they do."""
    inputs = inputs_of(131072, queries=16, keys=8, depth=128, rows=1)
    settings = replace(SETTINGS, scale=128**-0.5)
    seconds = {}
    with torch.no_grad():
        for queries in (0, 16384, 32768, 65536):
            once = [lambda queries=queries: attention_forward(
                inputs, settings, seed=0, kernel=Kernel("cudnn", queries))]  # fmt: skip
            laps(once * 4, torch.device(DEVICE))
            seconds[queries] = statistics.median(laps(once * 5, torch.device(DEVICE)))
    flops = 2 * 16 * 128 * 131072**2
    print({queries: f"{flops / took / 1e12:.0f} TFLOP/s" for queries, took in seconds.items()})
    assert min(took for queries, took in seconds.items() if queries) <= 1.1 * seconds[0]
