"""One call of a block: its arguments as flat leaves, cut along tokens, and a signature to tell calls apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.cache import cache_is_empty, cache_layers_of, is_cache, own_copy
from memo_runtime.blocks.containers import flatten, leaves_of, mapped, text_of, unflatten
from memo_runtime.blocks.region import as_made, copied_as_it_is
from memo_runtime.records import ArgumentAxes


@dataclass(frozen=True, slots=True)
class BlockCall:
    """The flattened ``(args, kwargs)`` of one block call.

    ``original``: the caller's own, as long as no leaf was exchanged. A block may append to a list that it is given.
    """

    leaves: tuple[Any, ...]
    spec: Any
    original: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    #: Layers of a key/value cache that are the block's own, where others are filled; empty: not known.
    cache_layers: frozenset[int] = frozenset()

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], block: nn.Module | None = None) -> BlockCall:
        """The call ``block(*args, **kwargs)``."""
        leaves, spec = flatten((args, kwargs))
        call = cls(tuple(leaves), spec, (args, kwargs))
        if block is None or not call.caches()[1]:
            return call
        return replace(call, cache_layers=cache_layers_of(block))

    def with_own_caches(self) -> BlockCall:
        """The call with a copy of each cache, empty as it is, which nobody else fills before a rerun."""
        own = {id(leaf): self._own(leaf) for leaf in self.leaves if is_cache(leaf)}
        if not own:
            return self
        leaves = tuple([own.get(id(leaf), leaf) for leaf in self.leaves])
        return BlockCall(leaves, self.spec, self._exchanged(own), self.cache_layers)

    def _own(self, leaf: Any) -> Any:
        empty = is_cache(leaf) and cache_is_empty(leaf, self.cache_layers)
        return own_copy(leaf, self.cache_layers) if empty else leaf

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` for one run of the block.

        An empty key/value cache is replaced by a copy that is thrown away after the run. The block computes what it
        would have (updating a cache copies keys and values, which changes their memory layout and with it the last
        bits of later sums), but no keys and values outlive it, and a rerun does not append to them.
        """
        own = {id(leaf): self._own(leaf) for leaf in self.leaves if is_cache(leaf)}
        found = self._exchanged(own)
        if found is None:
            found = unflatten([own.get(id(leaf), leaf) for leaf in self.leaves], self.spec)
        return found

    def _exchanged(self, own: dict[int, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The caller's own arguments with ``own`` in the place of caches, by identity of these; None: they are gone.

        A container without a cache stays the caller's, who reads what a block adds to it.
        """
        if self.original is None or not own:
            return self.original

        def exchanged(value: Any) -> Any:
            if id(value) in own:
                return own[id(value)]
            if value is None or isinstance(value, (torch.Tensor, bool, int, float, str)):
                return value
            if not any(id(leaf) in own for leaf in leaves_of(value)):
                return value
            return mapped(lambda leaf: own.get(id(leaf), leaf), value)

        args, kwargs = self.original
        return tuple([exchanged(value) for value in args]), {name: exchanged(value) for name, value in kwargs.items()}

    def replaced(self, leaves: dict[int, Any]) -> BlockCall:
        """The same call with some leaves exchanged."""
        exchanged = tuple(leaves.get(i, leaf) for i, leaf in enumerate(self.leaves))
        return BlockCall(exchanged, self.spec, cache_layers=self.cache_layers)

    def tensors(self) -> list[tuple[int, torch.Tensor]]:
        """(leaf index, tensor) of every tensor argument."""
        return [(i, leaf) for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]

    @property
    def input_leaf(self) -> int | None:
        """Leaf of the input hidden state: the first tensor of real or complex numbers with two dimensions or more."""
        for index, tensor in self.tensors():
            if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dim() >= 2:
                return index
        return None

    @property
    def is_empty(self) -> bool:
        """The input hidden state has no elements."""
        leaf = self.input_leaf
        return leaf is not None and self.leaves[leaf].numel() == 0

    def caches(self) -> tuple[bool, bool]:
        """(the call has a key/value cache, one that holds tokens already)."""
        found = [leaf for leaf in self.leaves if is_cache(leaf)]
        return bool(found), any(not cache_is_empty(cache, self.cache_layers) for cache in found)

    def cut(self, axes: Iterable[ArgumentAxes], start: int, stop: int) -> BlockCall:
        """The call on tokens [start, stop).

        Leaves that grow with tokens become views. Those with one token dimension lie in memory as a call of as many
        tokens would have them, since operators may copy where memory has gaps and save other tensors then. Masks with
        two stay views: they are large.
        """
        leaves: dict[int, Any] = {}
        for axis in axes:
            tensor = self.leaves[axis.leaf]
            for dim in axis.dims:
                tensor = tensor.narrow(dim, start, stop - start)
            grad = tensor.requires_grad
            if len(axis.dims) == 1:
                whole = self.leaves[axis.leaf]
                tensor = as_made(tensor.detach(), whole.shape, whole.stride(), axis.dims[0]).requires_grad_(grad)
            leaves[axis.leaf] = tensor
        return self.replaced(leaves)

    def with_tokens(self, axes: Iterable[ArgumentAxes], tokens: int) -> tuple[ArgumentAxes, ...]:
        """Those of ``axes`` along which this call has so many tokens.

        An argument may have had as many rows as the profiled batch had tokens by chance, and keeps them at others.
        """
        found = []
        for axis in axes:
            shape = getattr(self.leaves[axis.leaf], "shape", ())
            dims = tuple([dim for dim in axis.dims if dim < len(shape) and shape[dim] == tokens])
            if dims:
                found.append(axis if dims == axis.dims else replace(axis, dims=dims))
        return tuple(found)

    def detached(self, fresh: Sequence[int] = ()) -> BlockCall:
        """The call with every tensor detached, requiring grad where it did.

        A leaf listed in ``fresh`` is also copied, and no leaf of the graph, so that a block may write into it.
        """
        leaves: dict[int, Any] = {}
        for index, tensor in self.tensors():
            cut_off = tensor.detach().requires_grad_(tensor.requires_grad)
            leaves[index] = copied_as_it_is(cut_off) if index in fresh else cut_off
        return self.replaced(leaves)

    def way(self) -> str:
        """How the block is called: where with tensors, by type and rank; sizes are left out.

        What tells calls apart that go through other code of the block, or save other tensors: a mask, or none. What is
        no tensor does not count, for it may be another at every call; nor does a cache, which is empty or not managed.
        """
        return " ".join([_way_of(leaf) for leaf in self.leaves])

    def signature(self) -> str:
        """What distinguishes this call from one that may save other tensors; lengths are left out."""
        parts = []
        for leaf in self.leaves:
            if isinstance(leaf, torch.Tensor):
                parts.append(f"{leaf.dtype}/{leaf.dim()}/{leaf.requires_grad}")
            elif leaf is None or isinstance(leaf, (bool, float, str)):
                parts.append(repr(leaf))
            else:
                parts.append(type(leaf).__name__)
        return f"{text_of(self.spec)}|{';'.join(parts)}"


#: In a way of calling a block, what is no tensor.
NO_TENSOR = "_"


def _way_of(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        key = leaf.dtype, leaf.dim()
        found = _WAYS.get(key)
        if found is None:
            found = _WAYS[key] = f"{str(leaf.dtype).removeprefix('torch.')}[{leaf.dim()}d]"
        return found
    return NO_TENSOR


#: Words for tensors, by type and rank.
_WAYS: dict[tuple[torch.dtype, int], str] = {}


def sequences_in(hidden: torch.Tensor, tokens: int) -> int:
    """Sequences of ``tokens`` in an input hidden state, whose features come last."""
    return max(1, hidden.numel() // hidden.shape[-1] // tokens)


def first_tensor(output: Any) -> torch.Tensor | None:
    """The first floating-point tensor of what a block yields that has a gradient."""
    for leaf in leaves_of(output):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            return leaf
    return None
