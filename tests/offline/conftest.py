"""Tests of tiny models need no repeated timings."""

from tests.tiny import few_samples, one_thread

__all__ = ["few_samples", "one_thread"]
