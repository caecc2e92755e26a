"""Families with several stacks, stages, or one block called many times: found, and exact."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import memo_runtime as memo
from memo_runtime.blocks.stack import find_blocks
from memo_runtime.errors import NoBlocksError
from tests.api.subjects import refused
from tests.sharing import shared_work
from tests.tiny import few_samples

__all__ = ["few_samples", "shared_work"]


def _ids() -> torch.Tensor:
    return torch.randint(3, 64, (2, 24))


def _swin() -> tuple[nn.Module, Any]:
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2, 1], num_heads=[2] * 3, window_size=4,
        drop_path_rate=0.0,
    )
    return transformers.SwinModel(config), {"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64)}


def _convnext() -> tuple[nn.Module, Any]:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[2, 2, 3, 1], drop_path_rate=0.0)
    return transformers.ConvNextModel(config), {"pixel_values": torch.randn(2, 3, 64, 64, dtype=torch.float64)}


def _whisper() -> tuple[nn.Module, Any]:
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2, dropout=0.0,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=32,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    features = torch.randn(2, 8, 64, dtype=torch.float64)
    return transformers.WhisperForConditionalGeneration(config), {"input_features": features, "labels": _ids()}


def _clip() -> tuple[nn.Module, Any]:
    common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 64, "num_hidden_layers": 2, "eos_token_id": 2, **common},
        vision_config={"num_hidden_layers": 3, "image_size": 32, "patch_size": 8, **common},
    )
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    return transformers.CLIPModel(config), {"input_ids": _ids(), "pixel_values": images, "return_loss": True}


def _mamba() -> tuple[nn.Module, Any]:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, state_size=4)
    ids = _ids()
    return transformers.MambaForCausalLM(config), {"input_ids": ids, "labels": ids}


def _perceiver() -> tuple[nn.Module, Any]:
    config = transformers.PerceiverConfig(
        d_model=16, d_latents=16, num_latents=8, num_blocks=2, num_self_attends_per_block=2, num_self_attention_heads=2,
        num_cross_attention_heads=2, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.PerceiverModel(config), (torch.randn(2, 24, 16, dtype=torch.float64),)


def _albert() -> tuple[nn.Module, Any]:
    config = transformers.AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids = _ids()
    return transformers.AlbertForMaskedLM(config), {"input_ids": ids, "labels": ids}


FAMILIES: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], list[tuple[str, int]]]] = {
    "swin": (_swin, [(f"encoder.layers.{i}.blocks", n) for i, n in enumerate((2, 2, 1))]),
    "convnext": (_convnext, [(f"encoder.stages.{i}.layers", n) for i, n in enumerate((2, 2, 3, 1))]),
    "whisper": (_whisper, [("model.encoder.layers", 3), ("model.decoder.layers", 2)]),
    "clip": (_clip, [("text_model.encoder.layers", 2), ("vision_model.encoder.layers", 3)]),
    "mamba": (_mamba, [("backbone.layers", 3)]),
    "perceiver": (_perceiver, [("encoder.self_attends", 2)]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stack_of_a_family_is_found_and_exact(family: str) -> None:
    torch.manual_seed(0)
    make, stacks = FAMILIES[family]
    model, batch = make()
    model = model.double()
    want = [f"{name}.{index}" for name, count in stacks for index in range(count)]
    assert [ref.name for ref in find_blocks(model)] == want
    result = memo.check(model, batch)
    assert result.ok, result
    assert [block.name for block in result.report.blocks] == want
    assert result.report.totals.bytes_to_host > 0
    assert result.report.totals.recomputed_flops > 0


def test_albert_is_told_the_line_that_works() -> None:
    torch.manual_seed(0)
    model, batch = _albert()
    model = model.double()
    line = re.search(r"memo\.wrap\(model, blocks='([^']+)'\)", refused(NoBlocksError, memo.wrap, model))
    assert line
    result = memo.check(model, batch, blocks=line[1])
    assert result.ok, result
    assert result.report.totals.recomputed_flops > 0
