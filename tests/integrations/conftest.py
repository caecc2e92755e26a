"""Tiny models on one thread: two threads on a shared machine only wait for each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from memo_runtime.integrations import huggingface


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def lazy_whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models and float64 have full logits otherwise, and these tests are about those that are not full."""
    monkeypatch.setattr(huggingface, "full_logits_reason", lambda hidden, vocabulary: None)
