"""The benchmark of the allocator leaves nothing of its own in what it measures."""

import hashlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.allocator import _measured, _pieces
from memo_runtime.arena.plan import SMALL


@pytest.mark.parametrize("shape", [(3,), (1, 3000, 640), (700_001,), (2, 3, 5, 7, 11, 13, 17), (4, 1 << 18, 2)])
def test_pieces_are_the_whole(shape):
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    for tensor in (whole, whole.transpose(0, -1)):
        pieces = list(_pieces(tensor))
        assert sum(piece.numel() for piece in pieces) == tensor.numel()
        assert sum(piece.double().sum() for piece in pieces) == tensor.double().sum()
        assert all(8 * piece.numel() <= SMALL for piece in pieces)
        assert all(piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for piece in pieces)


class Largest(TorchDispatchMode):
    """The largest tensor that operators make."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.size = max(self.size, out.untyped_storage().nbytes())
        return out


def test_the_digest_sees_every_gradient_and_takes_no_large_request(monkeypatch):
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    names = ("num_device_alloc", "num_device_free", "num_alloc_retries")
    stats = dict.fromkeys((*names, "allocated_bytes.all.peak", "reserved_bytes.all.peak"), 0)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: stats)
    gradients = {"input": torch.ones(1, 4096, 512, dtype=torch.bfloat16), "weight": torch.ones(640, 700)}

    def digest():
        with Largest() as largest:
            found = _measured(lambda look: look(gradients) or 1.0 if look else 1.0, 1, "native", {})
        assert 0 < largest.size <= SMALL
        return found["gradients_digest"]

    first = digest()
    assert len(first) == len(hashlib.sha256().hexdigest()[:16])
    assert digest() == first
    gradients["weight"][639, 699] += 1
    assert digest() != first
