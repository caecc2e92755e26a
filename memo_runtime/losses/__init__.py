"""Losses of a language model's head at lengths where its logits do not fit."""

from memo_runtime.losses.head_loss import Backend, linear_cross_entropy
from memo_runtime.losses.lazy_logits import LogitsUnavailableError

__all__ = ["Backend", "LogitsUnavailableError", "linear_cross_entropy"]
