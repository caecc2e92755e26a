"""Long-lived tensors close together, before an arena takes what is left of the memory.

Weights and optimizer states that were made between activations sit alone in large segments, which PyTorch's allocator
cannot give back while they do:

    segment  [ weight |            free            ]      a storage is emptied and filled again in place, so all its
    segment  [   free   | state | free | gradient  ]      views stay what they are; only its address is another one
    after    [ weight | state | gradient ]
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

#: A segment with less that is free is left as it is; PyTorch's allocator rounds segments to this.
_WORTH = 2 << 20
#: Host memory that is in use at one time.
_BATCH = 2 << 30


def compact(tensors: Iterable[torch.Tensor], device: int) -> int:
    """Move ``tensors`` out of segments that hold nothing else, and return by how many bytes less is reserved.

    Nothing is moved where a graph or a private pool may know addresses. Tensors of other classes, and those whose
    storage is not the allocator's to resize, stay.
    """
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    storages = {storage.data_ptr(): storage for storage in _movable(tensors, device)}
    with torch.cuda.device(device):
        for batch in _batches(_sparse(storages, device)):
            kept = [(storage, _bytes_of(storage).cpu()) for storage in batch]
            with _uninterrupted():
                for storage, _ in kept:
                    storage.resize_(0)
                torch.cuda.empty_cache()
                for storage, values in kept:
                    storage.resize_(values.numel())
                    _bytes_of(storage).copy_(values)
    torch.cuda.synchronize(device)
    return before - torch.cuda.memory_reserved(device)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A Ctrl-C comes when this is over: between emptying and filling, weights are in host memory only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _movable(tensors: Iterable[torch.Tensor], device: int) -> Iterator[torch.UntypedStorage]:
    for tensor in tensors:
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if plain and tensor.device == torch.device("cuda", device):
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.resizable():
                yield storage


def _sparse(storages: dict[int, torch.UntypedStorage], device: int) -> list[torch.UntypedStorage]:
    """Storages of the segments that would be free without them, largest first."""
    segments: list[dict[str, Any]] = [s for s in torch.cuda.memory._snapshot()["segments"] if s["device"] == device]
    if any(tuple(segment["segment_pool_id"]) != (0, 0) or segment["is_expandable"] for segment in segments):
        return []
    found = []
    for segment in segments:
        live = [block for block in segment["blocks"] if block["state"] != "inactive"]
        free = segment["total_size"] - sum(block["size"] for block in live)
        if free >= _WORTH and all(block["address"] in storages for block in live):
            found += [storages[block["address"]] for block in live]
    return sorted(found, key=lambda storage: -storage.nbytes())


def _batches(storages: list[torch.UntypedStorage]) -> Iterator[list[torch.UntypedStorage]]:
    batch: list[torch.UntypedStorage] = []
    size = 0
    for storage in storages:
        if batch and size + storage.nbytes() > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(storage)
        size += storage.nbytes()
    if batch:
        yield batch
