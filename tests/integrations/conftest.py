"""Tiny models, whose logits are lazy all the same."""

from __future__ import annotations

import pytest

from memo_runtime.integrations import huggingface
from tests.sharing import shared_work
from tests.tiny import few_samples, one_thread

__all__ = ["few_samples", "lazy_whatever_the_size", "one_thread", "shared_work"]


@pytest.fixture(autouse=True)
def lazy_whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models and float64 have full logits otherwise, and these tests are about those that are not full."""
    monkeypatch.setattr(huggingface, "full_logits_reason", lambda hidden, vocabulary: None)
