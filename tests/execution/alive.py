"""Counts the bytes of the tensors that are alive, as no allocator does on the CPU."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Alive(TorchDispatchMode):
    """Bytes of tensors that were made since it began and are alive: now, and at most by phase.

    Attributes:
        phase: what is going on, as the test says. least: smaller storages are not counted.
    """

    def __init__(self, least=0):
        super().__init__()
        self._least = least
        self._alive = {}
        self.now = 0
        self.peaks = {}
        self.phase = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {one.untyped_storage()._cdata for one in args if isinstance(one, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, torch.Tensor) and one.device.type == "cpu":
                self._see(one.untyped_storage(), given)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)
        return out

    def _see(self, storage, given):
        key, size = storage._cdata, storage.nbytes()
        # What was given and is not known was there before.
        if size < self._least or key in self._alive or key in given:
            return
        self._alive[key] = size
        self.now += size
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        if self._alive.pop(key, None) is not None:
            self.now -= size
