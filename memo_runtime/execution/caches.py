"""Key/value caches that a wrapped model's caller wants to have, and those that were left empty.

A managed block fills a copy of an empty cache, which is thrown away (``blocks/call.py``): keys and values of every
block would stay on the device, and nobody who trains looks at them. transformers makes such a cache where nothing was
said. Whoever gives a cache, or says ``use_cache=True`` of a model in evaluation mode, wants it filled: a block that is
given such a one runs as it is. In training ``use_cache=True`` is overruled with a warning, as transformers does under
checkpointing. A cache that was left empty carries which of its layers were; where it is given to a later call it is
refused, for its tokens would be missing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.cache import cache_is_empty, cache_layers_of, is_cache, parts_of
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.containers import leaves_of
from memo_runtime.errors import ArgumentError

#: Why a block runs as it is.
WANTED = "its key/value cache was given by the caller, or asked for with use_cache=True in evaluation mode"
#: Where a cache has the layers that were left empty, one set for each block; a copy of the cache has them too.
_MARK = "_memo_left_empty"


class Caches:
    """What one wrapped model knows of caches."""

    def __init__(self) -> None:
        self._given: weakref.WeakSet[Any] = weakref.WeakSet()
        self._here = threading.local()

    @property
    def asked(self) -> bool:
        """``use_cache=True`` was said to the forward that runs on this thread."""
        return getattr(self._here, "asked", False)

    def look_at(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """``model`` is about to be called with these.

        Raises:
            ArgumentError: a cache among them was left empty by an earlier forward.
        """
        given = [leaf for leaf in leaves_of((args, kwargs)) if is_cache(leaf)]
        for cache in given:
            _refuse_left_empty(type(model).__name__, cache)
        managed = torch.is_grad_enabled()
        said = (one.get("use_cache") for one in (kwargs, *args, *kwargs.values()) if isinstance(one, Mapping))
        self._here.asked = managed and any(isinstance(one, int) and one for one in said)
        self._here.filled = self._here.asked and not model.training
        if managed:
            self._given.update(given)

    def forward_ended(self) -> None:
        """The last block of the forward on this thread is done."""
        self._here.asked = self._here.filled = False

    def wants(self, call: BlockCall) -> bool:
        """The caches of ``call`` are to be filled."""
        if getattr(self._here, "filled", False):
            return True
        return any(part in self._given for cache in _caches(call.leaves) for part in parts_of(cache))

    def leave_empty(self, block: nn.Module, call: BlockCall) -> None:
        """Managed ``block`` is run by ``call``, whose caches it does not fill."""
        for cache in _caches(call.leaves):
            for part in parts_of(cache):
                part.__dict__[_MARK] = part.__dict__.get(_MARK, frozenset()) | {cache_layers_of(block)}


def _caches(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if is_cache(value)]


def _refuse_left_empty(model: str, cache: Any) -> None:
    # One that was made of parts of another has no mark itself.
    marked = [part for part in (parts_of(cache) if _MARK not in cache.__dict__ else [cache]) if _MARK in part.__dict__]
    if marked and all(cache_is_empty(part, layers) for part in marked for layers in part.__dict__[_MARK]):
        raise ArgumentError(
            f"the key/value cache given to {model} is empty: a forward with gradients made it, in which wrapped "
            "blocks keep none of its keys and values. Would work: that forward under torch.no_grad(), or given a "
            "cache of your own (transformers.DynamicCache()), for which blocks run as they do unwrapped"
        )
