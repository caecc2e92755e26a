"""Recognising a model's key/value caches by type, without importing transformers.

A cache that is filled in a training forward holds the keys and values of every block, with gradients, and a
block that is run again appends to it. Its argument has had several names (``past_key_values``, ``cache``), so
it is found by its type: ``transformers.cache_utils.Cache`` and what derives from it. A legacy tuple of tuples
is not a cache here: nothing appends to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from torch import Tensor

_MODULE = "transformers.cache_utils"


def is_cache(value: object) -> bool:
    """Whether ``value`` is one of transformers' caches; False as long as transformers is not loaded."""
    base = getattr(sys.modules.get(_MODULE), "Cache", None)
    return isinstance(base, type) and isinstance(value, base)


def cache_is_empty(value: object) -> bool:
    """Whether a cache holds no state of any layer, so that a forward without it gives the same output.

    A cache whose buffers exist but were never written (a static one) counts as not empty: telling would read
    from the device.

    Raises:
        TypeError: ``value`` is no cache.
    """
    if not is_cache(value):
        raise TypeError(f"{type(value).__name__} is not a cache of transformers; ask is_cache first")
    parts = [
        part
        for name in ("self_attention_cache", "cross_attention_cache")
        if is_cache(part := getattr(value, name, None))
    ]
    if parts:
        return all(cache_is_empty(part) for part in parts)
    return not any(_is_state(item) for layer in getattr(value, "layers", ()) for item in _attributes(layer))


def _attributes(layer: object) -> Iterator[object]:
    """What a cache layer holds: keys and values, or states by number (linear attention)."""
    for item in vars(layer).values():
        if isinstance(item, Mapping):
            yield from item.values()
        else:
            yield item


def _is_state(item: object) -> bool:
    # States have a batch dimension and more; counters and window sizes kept as tensors do not.
    return isinstance(item, Tensor) and item.dim() >= 2 and item.numel() > 0
