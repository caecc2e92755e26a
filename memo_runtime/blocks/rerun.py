"""Running a block while watching what it saves for backward, the first time and again.

Autograd asks a pair of hooks for every tensor that it saves. In a rerun the k-th tensor saved is the k-th tensor
of the forward, on fewer tokens, because the graph has the same nodes; it is handed over and the rerun ends with the
last one, before the operators behind it (the MLP's down projection) run.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from memo_runtime.blocks.call import BlockCall

Forward = Callable[..., Any]
_DENSE = torch.strided
_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


class _AllSavedError(Exception):
    """The last tensor that backward needs has been made."""


class _Kept:
    """What a graph holds of a tensor where its run may go backward itself."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def stops_early(block: nn.Module) -> bool:
    """Whether a rerun may end in the middle of the forward.

    Sub-modules under ``fully_shard`` reshard in a post-forward hook that an early end would skip.
    """
    return not any(type(inner).__name__.startswith("FSDP") for inner in block.modules() if inner is not block)


def run_again(
    forward: Forward,
    call: BlockCall,
    on_saved: Callable[[int, torch.Tensor], None],
    *,
    mode: contextlib.AbstractContextManager[Any],
    last: int | None,
    on_walk: Callable[[], None] | None = None,
    held: list[weakref.ref[Any]] | None = None,
) -> int:
    """Run ``forward`` with grad and hand over every tensor that it saves, detached, with its index.

    Args:
        forward: the block's own forward.
        call: arguments, detached, requiring grad where the forward's did.
        on_saved: called with (index, tensor) in order of saving.
        mode: dispatch mode that replaces what must not be computed.
        last: index of the last tensor; the run ends there. None: run to the end.
        on_walk: called when the forward itself goes backward, which takes that all that it saves is kept meanwhile;
            None: it does not.
        held: with ``on_walk``, gets a reference for every tensor that dies where its node is gone.

    Returns:
        How many tensors were saved.
    """
    count = 0
    # The graph keeps its hooks, and what the receiver keeps may hold the graph: the tie is cut when the run is over.
    receiver = [on_saved]
    walker = [on_walk] if on_walk is not None else []
    walks = on_walk is not None

    def pack(tensor: torch.Tensor) -> _Kept | None:
        nonlocal count
        index, count = count, count + 1
        receiver[0](index, _detached(tensor))
        if index == last:
            raise _AllSavedError
        kept = _Kept(_detached(tensor)) if walks else None
        if held is not None and kept is not None:
            held.append(weakref.ref(kept))
        return kept

    def unpack(kept: _Kept | None) -> torch.Tensor:
        assert kept is not None and walker, "a rerun's own graph is never walked backward"
        walker[0]()
        return kept.tensor

    args, kwargs = call.arguments()
    with (
        torch.enable_grad(),
        saved_tensors_hooks(pack, unpack),
        mode,
        contextlib.suppress(_AllSavedError),
    ):
        try:
            forward(*args, **kwargs)
        finally:
            receiver.clear()
            walker.clear()
    return count


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` without its graph. Modes that count a block's operators are not asked: it is none of them."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return tensor.detach()  # a subclass has its own
    with torch._C._DisableTorchDispatch():
        return tensor.detach()


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the storage behind ``tensor`` while it is alive; of a sparse one that of its values.

    Not its address: FSDP frees and refills a gathered parameter's storage, and that stays the same storage.
    """
    if tensor.layout is not _DENSE and is_sparse(tensor):  # asked of every tensor at every call
        tensor = sparse_parts(tensor)[0]
    return int(tensor.untyped_storage()._cdata)


def is_sparse(tensor: torch.Tensor) -> bool:
    """It has no storage of its own, but values and where they are."""
    return tensor.layout in _SPARSE


def sparse_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The values of a sparse tensor, and where they are."""
    with torch._C._DisableTorchDispatch():
        if tensor.layout is torch.sparse_coo:
            return tensor._values(), tensor._indices()
        if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            return tensor.values(), tensor.crow_indices(), tensor.col_indices()
        return tensor.values(), tensor.ccol_indices(), tensor.row_indices()


def parameter_storages(block: nn.Module) -> set[int]:
    """Storages of the parameters and buffers of ``block`` as they are now (under FSDP2: unsharded)."""
    tensors = [*block.parameters(), *block.buffers()]
    # A DTensor (tensor parallelism) keeps its elements in a local tensor.
    return {storage_key(getattr(tensor, "_local_tensor", tensor)) for tensor in tensors}
