"""Caches are found by type, whatever their argument is called."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, DynamicCache, EncoderDecoderCache, LlamaConfig, LlamaForCausalLM, StaticCache

import memo_runtime as memo
from memo_runtime.blocks import call
from memo_runtime.blocks.cache import cache_is_empty, is_cache, own_copy
from memo_runtime.records import Executor


def fill(cache: DynamicCache) -> None:
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)


def test_a_dynamic_cache_is_empty_until_it_is_filled() -> None:
    cache = DynamicCache()
    assert is_cache(cache)
    assert cache_is_empty(cache)
    fill(cache)
    assert not cache_is_empty(cache)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next", "mistral"])
def test_caches_made_from_a_config_are_empty(family: str) -> None:
    assert cache_is_empty(DynamicCache(config=AutoConfig.for_model(family)))


def test_either_half_of_an_encoder_decoder_cache_counts() -> None:
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert is_cache(cache)
    assert cache_is_empty(cache)
    fill(cache.cross_attention_cache)
    assert not cache_is_empty(cache)


def test_a_static_cache_is_a_cache() -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=1, hidden_size=8, num_attention_heads=2)
    assert is_cache(StaticCache(config=config, max_cache_len=4))


def test_other_values_are_no_caches() -> None:
    assert not is_cache(((torch.zeros(1), torch.zeros(1)),))
    with pytest.raises(TypeError, match="tuple is not a cache"):
        cache_is_empty(())


def test_transformers_is_not_imported() -> None:
    code = "import sys, torch; from memo_runtime.blocks.cache import is_cache; assert not is_cache(object());"
    code += "from memo_runtime.integrations.huggingface import install; from memo_runtime.config import Loss;"
    code += "assert not install(torch.nn.Linear(2, 2), loss=Loss.AUTO).active;"
    code += "assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# What other blocks have left in it.


def test_a_layer_is_empty_whatever_others_hold() -> None:
    cache = DynamicCache()
    fill(cache)
    assert cache_is_empty(cache, frozenset({1}))
    assert not cache_is_empty(cache, frozenset({0, 1}))
    made = own_copy(cache, frozenset({1}))
    made.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 1)
    assert made.layers[0] is cache.layers[0]
    assert cache_is_empty(cache, frozenset({1}))


def test_a_copy_of_an_empty_cache_has_layers_of_its_own() -> None:
    cache = DynamicCache(config=AutoConfig.for_model("llama", num_hidden_layers=5))
    made = own_copy(cache, frozenset({1}))
    for layer in (1, 3):
        made.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), layer)
    assert cache_is_empty(cache)
    assert not cache_is_empty(made, frozenset({3}))
    assert not any(one is other for one, other in zip(made.layers, cache.layers, strict=True))


def test_tiles_copy_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are as many layers as blocks, so that a copy for each block is what grows with their square."""
    model, copies = llama(), []
    memo.wrap(model, policy="tiled")
    ids = torch.randint(0, 61, (2, 24))
    model(input_ids=ids, labels=ids).loss.backward()
    monkeypatch.setattr(call, "own_copy", lambda *given: copies.append(given) or own_copy(*given))
    model(input_ids=ids, labels=ids).loss.backward()
    assert {block.executor for block in memo.report(model).blocks} == {Executor.TILED}
    assert not copies


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def gradients(model: LlamaForCausalLM) -> list[torch.Tensor]:
    ids = torch.randint(0, 61, (2, 33), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize(("policy", "alpha"), [("swap", None), ("recompute", None), ("memo", 0.5)])
@pytest.mark.parametrize("managed", [(1, 2), (0, 2)])
def test_blocks_are_managed_beside_others_that_fill_it(
    managed: tuple[int, int], policy: str, alpha: float | None
) -> None:
    model = llama()
    want = gradients(model)
    names = [f"model.layers.{index}" for index in managed]
    memo.wrap(model, blocks=names, policy=policy, alpha=alpha, keep_last=0, loss="native")
    for _ in range(2):
        for got, expected in zip(gradients(model), want, strict=True):
            assert torch.allclose(got, expected, rtol=1e-11, atol=1e-15)
    report = memo.report(model)
    assert [(block.executor, block.reason) for block in report.blocks] == [(Executor.REPLAY, "")] * 2
    assert all(block.bytes_to_host for block in report.blocks)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, losses: dict[str, torch.Tensor], cache: DynamicCache) -> torch.Tensor:
        losses[f"of {len(losses)}"] = x.pow(2).mean()
        return x + self.linear(x).relu()


class Counting(torch.nn.Module):
    """Every layer is given an empty cache, and adds to a dict that the model reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        losses: dict[str, torch.Tensor] = {}
        cache = DynamicCache()
        for layer in self.layers:
            x = layer(x, losses, cache)
        assert len(losses) == len(self.layers)
        return sum(losses.values(), x.mean())


@pytest.mark.parametrize("policy", ["swap", "recompute", "tiled"])
def test_what_blocks_add_to_a_dict_beside_it_is_the_callers(policy: str) -> None:
    torch.manual_seed(0)
    plain = Counting().double()
    model = memo.wrap(copy.deepcopy(plain), policy=policy, keep_last=0)
    x = torch.randn(2, 33, 16, dtype=torch.float64)
    for _ in range(2):
        losses = [plain(x), model(x)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        for got, want in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(got.grad, want.grad, rtol=1e-11, atol=1e-15)


def test_a_rerun_starts_from_the_cache_of_its_forward() -> None:
    """A layer put in after wrap has the number of another one, and fills its part of the cache."""
    plain, model = llama(), llama()
    memo.wrap(model, policy="recompute", keep_last=0, loss="native")
    for one in (plain, model):
        one.model.layers[1] = copy.deepcopy(one.model.layers[0])
    plain.config.use_cache = False  # as it is for managed blocks
    want = gradients(plain)
    for got, expected in zip(gradients(model), want, strict=True):
        assert torch.allclose(got, expected, rtol=1e-11, atol=1e-15)
