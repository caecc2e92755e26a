"""Blocks of model families by tiles: everything that they yield and every gradient, in float64, to 1e-12."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from memo_runtime.blocks.declared import declare_token_wise
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution.tiled import TiledBlock, Way
from memo_runtime.execution.tiled_heads import grouping
from tests.exactness.models import _DECODER, _ENCODER, FAMILIES, Family
from tests.execution.tiles import assert_exact, call_of, calls_of

_NO_DROPOUT = {
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "vit": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
    "llama-eager": {"attention_dropout": 0.0},
}
_FALCON = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2}
_LATENT = _DECODER | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,  # experts are in no block
}
_MORE = {
    "olmo": Family(transformers.OlmoForCausalLM, transformers.OlmoConfig, _DECODER),
    "olmo2": Family(transformers.Olmo2ForCausalLM, transformers.Olmo2Config, _DECODER),
    "phi3": Family(transformers.Phi3ForCausalLM, transformers.Phi3Config, _DECODER),
    "mistral": Family(transformers.MistralForCausalLM, transformers.MistralConfig, _DECODER | {"sliding_window": 6}),
    "gpt-neox": Family(
        transformers.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig,
        {key: value for key, value in _DECODER.items() if key != "num_key_value_heads"}
        | {"hidden_dropout": 0.0, "attention_dropout": 0.0, "use_parallel_residual": True},
    ),
    "falcon": Family(
        transformers.FalconForCausalLM, transformers.FalconConfig, _FALCON | {"new_decoder_architecture": True}
    ),
    "falcon-alibi": Family(transformers.FalconForCausalLM, transformers.FalconConfig, _FALCON | {"alibi": True}),
    "deepseek-v2": Family(transformers.DeepseekV2ForCausalLM, transformers.DeepseekV2Config, _LATENT),
    "deepseek-v3": Family(transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config, _LATENT),
    "roberta": Family(
        transformers.RobertaForMaskedLM,
        transformers.RobertaConfig,
        _ENCODER | {"vocab_size": 97, "max_position_embeddings": 64} | _NO_DROPOUT["bert"],
    ),
}
_OLD = ("llama", "qwen3", "gpt2", "gemma3", "bert", "vit", "t5", "llama-eager")
_ALL = {name: FAMILIES[name] for name in _OLD} | _MORE


pytestmark = pytest.mark.slow  # minutes; test_tiled.py has the same paths on one block each


@pytest.fixture(autouse=True)
def _norms_in_double(monkeypatch):
    """Gemma's norms compute in float32, where sums over tiles differ in the last bits of float32."""
    norm = transformers.models.gemma3.modeling_gemma3.Gemma3RMSNorm

    def forward(self, x):
        return self._norm(x) * (1.0 + self.weight)

    monkeypatch.setattr(norm, "forward", forward)


@pytest.mark.parametrize("name", _ALL)
def test_a_family_is_exact(name):
    for call in calls_of(_ALL[name], **_NO_DROPOUT.get(name, {})):
        assert_exact(call, TiledBlock(call.block, tile=8, alpha=0.5))


@pytest.mark.parametrize(("tokens", "tile"), [(17, 4), (16, 4), (17, 17), (17, 100), (26, 25)])
def test_lengths_and_tiles(tokens, tile):
    (call,) = calls_of(FAMILIES["llama"], tokens=tokens)
    assert_exact(call, TiledBlock(call.block, tile=tile))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_layers(norm_first, batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        32, 4, 48, dropout=0.0, norm_first=norm_first, batch_first=batch_first, dtype=torch.float64
    )
    x = torch.randn(3, 17, 32, dtype=torch.float64, requires_grad=True)
    assert_exact(call_of(layer, x), TiledBlock(layer, tile=8))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padded_batches(name):
    family = FAMILIES[name]
    padded = Family(family.model, family.config, family.settings, lambda **size: family.batch(padded=True, **size))
    for call in calls_of(padded, **_NO_DROPOUT.get(name, {})):
        assert_exact(call, TiledBlock(call.block, tile=8))


def test_experts_are_refused():
    call = calls_of(FAMILIES["mixtral"])[0]
    with pytest.raises(CaptureRefusedError, match=r"depends on data|cannot be traced"):
        TiledBlock(call.block, tile=8)(*call.args, **call.kwargs)


def test_attention_with_sinks():
    """GPT-OSS writes it out, and routes to experts."""
    settings = _DECODER | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}
    family = Family(transformers.GptOssForCausalLM, transformers.GptOssConfig, settings)
    (call,) = calls_of(family, experts_implementation="eager")
    declare_token_wise(call.block.mlp)
    assert_exact(call, TiledBlock(call.block, tile=8, alpha=0.5))


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama-eager"])
def test_dropout_is_that_of_given_masks(name):
    """With dropout on, the check compares with the block under the masks that its tiles drew: it passes, or raises."""
    for call in calls_of(FAMILIES[name], tokens=33):
        if "Cross" in type(call.block).__name__:
            continue
        tiled = TiledBlock(call.block, tile=8)
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            result = tiled(*call.args, **call.kwargs)
            results.append(result[0] if isinstance(result, tuple) else result)
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", [one for one in _ALL if one != "llama-eager"])
def test_a_family_is_exact_by_groups_of_heads(name):
    for call in calls_of(_ALL[name], **_NO_DROPOUT.get(name, {})):
        tiled = TiledBlock(call.block, tile=8, alpha=0.5)
        tiled.way = lambda: Way(tile=8, alpha=0.5, groups=2)
        assert_exact(call, tiled)
        found = [grouping(captured, at) for _, captured in tiled._captures
                 for at in range(len(captured.stages.stages))]  # fmt: skip
        heads = [how.heads for how in found if how is not None]
        assert ["groups" in kernel for kernel in tiled.kernels].count(True) == sum(one % 2 == 0 for one in heads)
        # T5's bias of all pairs wants a gradient; Falcon's keys of this kind have one head.
    assert heads or name in ("t5", "falcon-alibi")
