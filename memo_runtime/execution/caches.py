"""Key/value caches that a wrapped model's caller wants to have, and those that were left empty.

A managed block fills a copy of an empty cache, which is thrown away (``blocks/call.py``): keys and values of every
block would stay on the device, and nobody who trains looks at them. transformers makes such a cache where nothing was
said. Whoever gives a cache, or says ``use_cache=True`` of a model in evaluation mode, wants it filled: in that forward
blocks that are given one run as they are. In training ``use_cache=True`` is overruled with a warning, as transformers
does under checkpointing. One that was left empty and comes back as an argument is refused: its tokens would be missing.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from memo_runtime.blocks.cache import is_cache
from memo_runtime.blocks.call import BlockCall
from memo_runtime.errors import ArgumentError

#: Why a block runs as it is.
WANTED = "its key/value cache was given by the caller, or asked for with use_cache=True in evaluation mode"


class Caches:
    """What one wrapped model knows of caches."""

    def __init__(self) -> None:
        self.wanted = False
        #: ``use_cache=True`` was said.
        self.asked = False
        self._left_empty: weakref.WeakSet[Any] = weakref.WeakSet()

    def look_at(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """``model`` is about to be called with these.

        Raises:
            ArgumentError: a cache among them was left empty by an earlier forward.
        """
        given = [value for value in (*args, *kwargs.values()) if is_cache(value)]
        if any(cache in self._left_empty for cache in given):
            raise ArgumentError(
                f"the key/value cache given to {type(model).__name__} is empty: a forward with gradients made it, in "
                "which wrapped blocks keep none of its keys and values. Would work: that forward under torch.no_grad(),"
                " or given a cache of your own (transformers.DynamicCache()), for which blocks run as they do unwrapped"
            )
        self.asked = kwargs.get("use_cache") is True
        self.wanted = bool(given) or (self.asked and not model.training)

    def leave_empty(self, call: BlockCall) -> None:
        """A managed block is run by ``call``, whose caches it does not fill."""
        self._left_empty.update(leaf for leaf in call.leaves if is_cache(leaf))
