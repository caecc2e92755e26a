"""Small logits and float64 logits are made whole, so that the wrapped model has the unwrapped one's bits."""

from __future__ import annotations

import torch

from memo_runtime.integrations.huggingface import full_logits_reason


def test_small_and_float64_logits_are_whole():
    assert "at most" in str(full_logits_reason(torch.empty(2, 8, 16), 1000))
    assert "float64" in str(full_logits_reason(torch.empty(2, 4096, 16, dtype=torch.float64), 100_000))
    assert full_logits_reason(torch.empty(1, 4096, 16), 100_000) is None
