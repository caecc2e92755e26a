"""Sliding windows offline: the pairs in them are counted, whatever few tokens a block is looked at with."""

import pytest

from memo_runtime.machines.catalogue import find_machine
from memo_runtime.offline.profile import study_model
from memo_runtime.offline.subject import Subject
from memo_runtime.offline.windows import window_of

transformers = pytest.importorskip("transformers")
WINDOW, TOKENS, HEADS, WIDTH = 512, 8192, 2, 32
COMMON = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": HEADS,
    "num_key_value_heads": 1, "max_position_embeddings": 1 << 15, "sliding_window": WINDOW, "pad_token_id": 0,
}  # fmt: skip


def study(kind, **fields) -> Subject:
    import torch

    from memo_runtime.offline.subject import subject_of

    config = transformers.AutoConfig.for_model(kind, **{**COMMON, **fields})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ids = torch.zeros(1, 64, dtype=torch.long, device="meta")
    made = subject_of("mine", model, ((), {"input_ids": ids, "labels": ids, "use_cache": False}))
    return study_model(made, find_machine("h100-80gb"))


def pairs(tokens, window):
    """Pairs of a query and a key, as causal attention counts them: half of a square."""
    return tokens**2 / 2 if tokens <= window else tokens * window - window**2 / 2


def attention_flops(found, tokens, window):
    """What a window changes: model FLOPs beyond those of the same model with one that holds everything."""
    return 3 * 4 * HEADS * WIDTH * (pairs(tokens, tokens) - pairs(tokens, window))


def test_a_window_in_every_layer():
    """Phi3 hands on that of its config."""
    near, far = study("phi3", num_hidden_layers=2), study("phi3", num_hidden_layers=2, sliding_window=1 << 20)
    assert window_of(near.subject.model.model.layers[0]) == WINDOW
    saved = far.at(TOKENS).model_flops - near.at(TOKENS).model_flops
    assert saved == pytest.approx(2 * attention_flops(near, TOKENS, WINDOW), rel=1e-6)
    assert near.at(512).model_flops == far.at(512).model_flops
    times = [one.at(1 << 20).profile.blocks[0].forward_seconds.exact(1 << 20) for one in (near, far)]
    assert times[0] < 0.1 * times[1]
    assert any("2 of 2 blocks attend to a window of 512 tokens" in note for note in near.at(TOKENS).profile.notes)
    assert not any("window" in note for note in near.at(512).profile.notes)


def test_windows_in_some_layers():
    """Gemma 3 says so in each layer."""
    found = study("gemma3_text", num_hidden_layers=3, head_dim=WIDTH, sliding_window_pattern=3, layer_types=[
        "sliding_attention", "sliding_attention", "full_attention"])  # fmt: skip
    assert [window_of(layer) for layer in found.subject.model.model.layers] == [WINDOW, WINDOW, None]
    blocks = found.at(1 << 20).profile.blocks
    assert blocks[0].forward_seconds == blocks[1].forward_seconds
    assert blocks[0].forward_seconds.exact(1 << 20) < 0.1 * blocks[2].forward_seconds.exact(1 << 20)
    assert any("2 of 3 blocks" in note for note in found.at(TOKENS).profile.notes)
