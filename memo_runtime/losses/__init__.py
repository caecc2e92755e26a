"""Losses of a language model's head at lengths where its logits do not fit."""

from memo_runtime.losses.head_loss import Backend, linear_cross_entropy

__all__ = ["Backend", "linear_cross_entropy"]
