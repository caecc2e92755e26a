"""Tiny models."""

from tests.tiny import few_samples, one_thread

__all__ = ["few_samples", "one_thread"]
