"""Key/value caches that a wrapped model's caller wants to have, and those that were left empty.

A managed block fills a copy of an empty cache, which is thrown away (``blocks/call.py``): keys and values of every
block would stay on the device, and nobody who trains looks at them. transformers makes such a cache where nothing was
said. Whoever gives a cache, or says ``use_cache=True`` of a model in evaluation mode, wants it filled: a block that is
given such a one runs as it is. In training ``use_cache=True`` is overruled with a warning, as transformers does under
checkpointing. A cache that a block has left empty carries the block's name; where it comes back it is refused, for its
tokens would be missing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.cache import cache_is_empty, is_cache, parts_of
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.containers import leaves_of
from memo_runtime.errors import ArgumentError

#: Why a block runs as it is.
WANTED = "its key/value cache was given by the caller, or asked for with use_cache=True in evaluation mode"
#: Where a cache has the names of the blocks that left it empty; a copy of the cache has them too.
_MARK = "_memo_left_empty"


class Caches:
    """What one wrapped model knows of caches."""

    def __init__(self) -> None:
        self._given: weakref.WeakSet[Any] = weakref.WeakSet()
        self._here = threading.local()
        self._marked = False

    @property
    def asked(self) -> bool:
        """``use_cache=True`` was said to the forward that runs on this thread."""
        return getattr(self._here, "asked", False)

    def look_at(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """``model`` is about to be called with these."""
        managed = torch.is_grad_enabled()
        self._here.asked = managed and bool(kwargs.get("use_cache"))
        self._here.filled = self._here.asked and not model.training
        if managed:
            self._given.update(leaf for leaf in leaves_of((args, kwargs)) if is_cache(leaf))

    def forward_ended(self) -> None:
        """The last block of the forward on this thread is done."""
        self._here.asked = self._here.filled = False

    def wants(self, call: BlockCall) -> bool:
        """The caches of ``call`` are to be filled."""
        if getattr(self._here, "filled", False):
            return True
        return any(part in self._given for cache in _caches(call.leaves) for part in parts_of(cache))

    def leave_empty(self, block: str, call: BlockCall) -> None:
        """Managed ``block`` is run by ``call``, whose caches it does not fill."""
        for cache in _caches(call.leaves):
            for part in parts_of(cache):
                part.__dict__[_MARK] = part.__dict__.get(_MARK, frozenset()) | {block}
        self._marked = True

    def refuse_left_empty(self, block: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """``block`` is about to be called with these.

        Raises:
            ArgumentError: a cache among them lacks what an earlier call of this block did not leave in it.
        """
        if not self._marked:
            return
        for cache in _caches((*args, *kwargs.values())):
            if block in cache.__dict__.get(_MARK, ()) and cache_is_empty(cache):
                raise ArgumentError(
                    f"the key/value cache given to '{block}' is empty: a forward with gradients made it, in which "
                    "wrapped blocks keep none of its keys and values. Would work: that forward under torch.no_grad(), "
                    "or given a cache of your own (transformers.DynamicCache()), for which blocks run as they do "
                    "unwrapped"
                )


def _caches(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if is_cache(value)]
