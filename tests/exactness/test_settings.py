"""What else is switched on: autocast, adapters, frozen parameters, padding on the left, tiled losses, shared blocks."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import memo_runtime as memo
from memo_runtime.blocks.ambient import AttentionState
from tests.exactness import hand_written as blocks
from tests.exactness.compare import (
    OTHER_WAYS,
    Step,
    Way,
    assert_acted,
    assert_clean,
    assert_exact,
    assert_gradients,
    assert_same,
    assert_trade,
    model_loss,
    output_loss,
    relative_error,
    run_step,
)
from tests.exactness.models import FAMILIES, text

three_ways = pytest.mark.parametrize("way", OTHER_WAYS, ids=str)


def autocast_loss(model: nn.Module, inputs: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model_loss(model, inputs)


@three_ways
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_autocast(family: str, way: Way) -> None:
    """Equal where nothing is run again; else as far from float64 as the unwrapped model, median of five seeds."""
    made = FAMILIES[family]
    dropout = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop")}.get(
        family, ("hidden_dropout_prob", "attention_probs_dropout_prob") if family == "bert" else ()
    )
    exact = made.make(**dict.fromkeys(dropout, 0.0))
    plain = copy.deepcopy(exact).float()
    wrapped = way.wrap(copy.deepcopy(plain))
    ratios = []
    for seed in range(1 if way.equal else 5):
        inputs = text(rows=2, tokens=29, seed=seed)
        want, got = (run_step(model, inputs, autocast_loss) for model in (plain, wrapped))
        assert torch.equal(got.loss, want.loss)
        if way.equal:
            assert_gradients(got.gradients, want.gradients, way)
        reference = run_step(exact, inputs).gradients
        ratios.append(_distance(got.gradients, reference) / _distance(want.gradients, reference))
    assert statistics.median(ratios) <= 1.1
    assert_acted(wrapped, way)
    assert_trade(wrapped)
    assert_clean(wrapped)


def _distance(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    return sum(float((got[name].double() - want[name]).norm()) ** 2 for name in want) ** 0.5


@three_ways
def test_autocast_with_dropout(way: Way) -> None:
    """Backward outside of autocast rebuilds under the forward's state."""
    made = FAMILIES["gpt2"]
    plain = made.make().float()
    wrapped = way.wrap(copy.deepcopy(plain))
    inputs = text(rows=2, tokens=29)
    want, got = (run_step(model, inputs, autocast_loss) for model in (plain, wrapped))
    assert torch.equal(got.loss, want.loss)
    assert relative_error(got.gradients, want.gradients) <= (0.0 if way.equal else 2e-2)
    assert_acted(wrapped, way)


@three_ways
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters(family: str, way: Way) -> None:
    """LoRA with its own dropout; the base model is frozen, so block 0 gets an input without gradients."""
    import peft

    targets = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}[family]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules=targets, init_lora_weights=False,
        fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    torch.manual_seed(0)
    model = peft.get_peft_model(FAMILIES[family].make(), config).double()
    inputs = text(rows=2, tokens=21, padded=True)
    assert_exact(model, inputs, way)
    assert all("lora" in name for name in run_step(model, inputs).gradients)


@three_ways
@pytest.mark.parametrize("frozen", ["embeddings", "norms", "all but norms", "all but the last block"])
def test_frozen_parameters(frozen: str, way: Way) -> None:
    model = FAMILIES["llama"].make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            {
                "embeddings": "embed" not in name,
                "norms": "norm" not in name,
                "all but norms": "norm" in name,
                "all but the last block": "layers.1" in name,
            }[frozen]
        )
    inputs = text(rows=2, tokens=21)
    if frozen != "all but the last block":
        assert_exact(model, inputs, way)
        return
    want = run_step(model, inputs)
    way.wrap(model)
    assert_same(run_step(model, inputs), want, way)
    first, last = memo.report(model).blocks
    assert first.bytes_to_host == first.recomputed_flops == 0  # it saves nothing
    assert last.bytes_to_host > 0
    assert_clean(model)


@three_ways
def test_unfreezing_between_steps(way: Way) -> None:
    plain, wrapped = FAMILIES["llama"].make(), FAMILIES["llama"].make()
    way.wrap(wrapped)
    inputs = text(rows=2, tokens=21)
    for frozen in (True, False):
        for model in (plain, wrapped):
            model.get_submodule("model.embed_tokens").requires_grad_(not frozen)
        assert_same(run_step(wrapped, inputs), run_step(plain, inputs), way)
        assert_trade(wrapped)


@three_ways
def test_padding_on_the_left(way: Way) -> None:
    assert_exact(FAMILIES["llama"].make(), text(rows=3, tokens=21, left=True), way)


@three_ways
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_key_value_cache_is_thrown_away(family: str, way: Way) -> None:
    """``use_cache`` stays on: gradients are those of the model with it, and the output's cache stays empty."""
    made = FAMILIES[family]
    model = made.make()
    inputs = made.batch(rows=2, tokens=21)
    want = run_step(model, inputs | {"use_cache": True})
    way.wrap(model)
    assert_same(run_step(model, inputs | {"use_cache": True}), want, way)
    assert any("cache" in note for note in assert_acted(model, way).notes)
    assert model(**inputs, use_cache=True).past_key_values.get_seq_length() == 0


@three_ways
def test_last_blocks_stay_on_the_device(way: Way) -> None:
    torch.manual_seed(0)
    model = blocks.Stack(*(blocks.Attention() for _ in range(4))).double()
    inputs = {"x": blocks.sequence()}
    want = run_step(model, inputs, output_loss)
    way.wrap(model, keep_last=2)
    for _ in range(2):
        assert_same(run_step(model, inputs, output_loss), want, way)
    report = memo.report(model)
    assert [block.executor.value for block in report.blocks] == ["replay", "replay", "keep", "keep"]
    assert [block.bytes_to_host > 0 for block in report.blocks] == [True, True, False, False]
    assert all(block.bytes_kept > 0 for block in report.blocks[2:])
    assert_trade(model)
    assert_clean(model)


@three_ways
def test_one_block_called_three_times(way: Way) -> None:
    """Layers that share a module (ALBERT): each call has a stash of its own."""

    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = blocks.Attention()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.block(x)
            return x

    torch.manual_seed(0)
    model = Looped().double()
    inputs = {"x": blocks.sequence()}
    want = run_step(model, inputs, output_loss)
    way.wrap(model, blocks=["block"])
    for _ in range(2):
        assert_same(run_step(model, inputs, output_loss), want, way)
    assert_trade(model, times=3)
    assert_clean(model)


@three_ways
def test_float32(way: Way) -> None:
    """Rounding differs where a slice is run again, no more than float32 explains."""
    model = FAMILIES["gpt2"].make().float()
    inputs = text(rows=2, tokens=29)
    want = run_step(model, inputs)
    way.wrap(model)
    got: Step = run_step(model, inputs)
    assert torch.equal(got.loss, want.loss)
    if way.equal:
        assert_gradients(got.gradients, want.gradients, way)
    assert _distance(got.gradients, want.gradients) <= 1e-5 * _distance(
        want.gradients, {name: torch.zeros_like(value) for name, value in want.gradients.items()}
    )
    assert_acted(model, way)
    assert_trade(model)


@pytest.mark.parametrize("backends", [[SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION]], ids=["math", "flash"])
@pytest.mark.parametrize(("policy", "alpha"), [("memo", 0.3), ("replay", 0.3), ("recompute", None), ("tiled", None)])
def test_kernels_of_attention_that_forward_alone_allows(policy: str, alpha: float | None, backends: list[Any]) -> None:
    """As ``sdpa_kernel`` is used around a model, whose backward comes when that is over."""
    torch.manual_seed(0)
    model = blocks.Stack(*[blocks.Attention() for _ in range(3)]).double()
    plain = copy.deepcopy(model)
    memo.wrap(model, policy=policy, alpha=alpha, keep_last=0 if policy != "tiled" else None)
    kinds = ["flash", "math", "mem_efficient", "cudnn"]
    enabled = [getattr(torch.backends.cuda, f"{kind}_sdp_enabled") for kind in kinds]

    def loss(one: nn.Module) -> Tensor:
        with sdpa_kernel(backends):
            return one(blocks.sequence())[0].square().mean()

    order = torch._C._get_sdp_priority_order()
    for _ in range(2):
        for one in (model, plain):
            one.zero_grad()
            loss(one).backward()
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-14)
    assert all(now() for now in enabled)
    assert torch._C._get_sdp_priority_order() == order
    report = memo.report(model)
    assert not any(block.reason for block in report.blocks)
    if policy == "tiled":
        kernel = "rows" if backends == [SDPBackend.MATH] else "cpu"
        assert {block.attention for block in report.blocks} == {(kernel,)}


def test_the_order_of_kernels_is_that_of_the_forward() -> None:
    """Also what is not named in the restriction, and back again when a rerun is over."""
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        state = AttentionState.current()
    before = AttentionState.current()
    assert state != before
    with state.restored():
        assert AttentionState.current() == state
        assert torch._C._get_sdp_priority_order()[0] == int(SDPBackend.EFFICIENT_ATTENTION)
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert AttentionState.current() == before
