"""Caches are found by type, whatever their argument is called."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, DynamicCache, EncoderDecoderCache, StaticCache

from memo_runtime.blocks.cache import cache_is_empty, is_cache


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
