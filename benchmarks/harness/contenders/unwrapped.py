"""The subject as it is: everything that autograd saves stays on the device."""

from __future__ import annotations

from benchmarks.harness.contenders.base import Training


class Unwrapped(Training):
    """Plain PyTorch."""
