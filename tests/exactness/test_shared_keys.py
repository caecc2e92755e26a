"""Keys and values that a block leaves for others in an object that is no container (Gemma 3n)."""

from __future__ import annotations

import transformers

import memo_runtime as memo
from tests.exactness.compare import MEMO, assert_gradients, run_step
from tests.exactness.models import Family, text

GEMMA = Family(
    transformers.Gemma3nForCausalLM,
    transformers.Gemma3nTextConfig,
    {
        "hidden_size": 32,
        "intermediate_size": [48] * 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 97,
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
        "max_position_embeddings": 64,
        "layer_types": ["full_attention"] * 2,
        "num_kv_shared_layers": 1,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 2,
        "pad_token_id": 0,
    },
)


def test_no_step_is_lost() -> None:
    """Those keys were found on a slice as results of ``detach``, whose calls the step numbers otherwise."""
    model, batch = GEMMA.make(), text(rows=2, tokens=23)
    want = run_step(model, batch)
    MEMO.wrap(model)
    assert_gradients(run_step(model, batch).gradients, want.gradients, MEMO)
    first, second = memo.report(model).blocks
    assert first.bytes_to_host > 0
    assert not first.reason
    assert second.bytes_to_host > 0
    assert second.reason
