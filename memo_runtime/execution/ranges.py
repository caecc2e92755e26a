"""Names in a profiler's trace."""

from __future__ import annotations

import contextlib

import torch


def named(name: str) -> contextlib.AbstractContextManager[object]:
    """A range of that name where a profiler records; to enter one that nobody sees takes as long as six launches."""
    recording = torch._C._autograd._profiler_enabled()
    return torch.profiler.record_function(name) if recording else contextlib.nullcontext()
