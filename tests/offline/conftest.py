"""Tests of tiny models need no repeated timings."""

from tests.sharing import shared_work
from tests.tiny import few_samples, one_thread

__all__ = ["few_samples", "one_thread", "shared_work"]
