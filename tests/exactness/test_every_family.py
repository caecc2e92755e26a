"""Every family of transformers of which a tiny model can be made: exact by slices and by tiles, and managed.

Slow. Sizes go by the names that configs share; a family that wants others is skipped with what it said.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import memo_runtime as memo
from memo_runtime.blocks.stack import find_blocks
from memo_runtime.errors import NoBlocksError
from tests.exactness import models

pytestmark = pytest.mark.slow

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embedding_size": 32, "emb_dim": 32, "lru_width": 32,
    "word_embed_proj_dim": 32, "intermediate_size": 48, "n_inner": 48, "d_ff": 48, "hidden_dim": 48, "ffn_dim": 48,
    "ffn_hidden_size": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_hidden_layers": 3, "n_layer": 3,
    "n_layers": 3, "num_layers": 3, "encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 4, "n_head": 4,
    "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "vocab_size": models.VOCABULARY,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 0, "type_vocab_size": 2, "relative_attention_num_buckets": 8,
    "sliding_window": 16, "attention_window": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16,
    "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "state_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_d_head": 16, "mamba_n_heads": 4, "mamba_d_state": 8,
    "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4, "conv_kernel": 4, "time_step_rank": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": models.VOCABULARY, "num_kv_shared_layers": 1,
    "num_loops": 2, "rotary_dim": 4, "block_size": 8, "image_size": models.IMAGE, "patch_size": 4,
    "num_channels": 3,
}  # fmt: skip
_MOST_PARAMETERS = 12_000_000
_KINDS = {
    "causal": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, models.text),
    "pairs": (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, models.pairs),
    "masked": (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, models.text),
    "images": (modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, models.images),
}
_EVERY = [(kind, family) for kind, (table, _) in _KINDS.items() for family in table]


def _config(family: str) -> Any:
    kind = CONFIG_MAPPING[family]
    known = {*inspect.signature(kind.__init__).parameters, *vars(kind()), *getattr(kind, "attribute_map", {})}
    sizes = {name: size for name, size in _SIZES.items() if name in known}
    if "qk_rope_head_dim" in known:  # latent attention: every head has keys, and their size is a sum of others
        sizes = {name: size for name, size in sizes.items() if name not in ("head_dim", "num_key_value_heads")}
    config = kind(**sizes)
    config.use_cache = False
    config.num_labels = 5
    config._experts_implementation = "eager"  # grouped products take no float64
    return config


def _kind(kind: str, family: str) -> Any:
    name: Any = _KINDS[kind][0][family]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def _count(kind: str, family: str) -> int:
    """Its parameters, of which none is made."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in _kind(kind, family)(_config(family)).parameters())


def _model(kind: str, family: str, batch: Mapping[str, Any]) -> nn.Module:
    try:
        if (count := _count(kind, family)) > _MOST_PARAMETERS:
            pytest.skip(f"{count:,} parameters: other names for its sizes")
        torch.manual_seed(0)
        model: nn.Module = _kind(kind, family)(_config(family)).double().train()
        model(**batch).loss.backward()
    except Exception as error:
        pytest.skip(f"no tiny model of it trains as it is: {type(error).__name__}: {error}")
    return model


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "family"), _EVERY, ids=map("-".join, _EVERY))
def test_a_family_is_exact(kind: str, family: str) -> None:
    batch = _KINDS[kind][1](rows=2, tokens=45)
    model = _model(kind, family, batch)
    try:
        find_blocks(model)
    except NoBlocksError as error:
        pytest.skip(str(error))
    for settings in ({"policy": "memo", "alpha": 0.37}, {"policy": "tiled", "tile": 16}):
        found = memo.check(model, batch, **settings)
        assert found.ok, found
        assert found.report.totals.bytes_to_host > 0, found


def test_most_families_can_be_made_tiny() -> None:
    """Else a release with other names for its sizes would leave nothing to compare."""
    tiny = 0
    for kind, family in _EVERY:
        with contextlib.suppress(Exception):
            tiny += _count(kind, family) <= _MOST_PARAMETERS
    assert tiny > len(_EVERY) * 0.6
