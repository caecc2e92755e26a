"""What makes tests of tiny models quick: one thread, and no repeated timings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from memo_runtime.profiling import timing


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads on a shared machine only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def few_samples() -> Iterator[None]:
    """A block of a millisecond is never timed steadily, so a profile would time it four times for each length."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_MOST_SAMPLES", 1)
        yield
