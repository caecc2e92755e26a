"""Recognising a model's key/value caches by type, without importing transformers.

A cache that is filled in a training forward holds the keys and values of every block, with gradients, and a
block that is run again appends to it. Its argument has had several names (``past_key_values``, ``cache``), so
it is found by its type: ``transformers.cache_utils.Cache`` and what derives from it. A legacy tuple of tuples
is not a cache here: nothing appends to it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from memo_runtime.blocks.containers import leaves_of
from memo_runtime.errors import ArgumentError

#: Why a block that is called with one that is not empty runs as it is.
HOLDS_TOKENS = "it was called with a key/value cache that holds tokens already"
_MODULE = "transformers.cache_utils"
_PARTS = ("self_attention_cache", "cross_attention_cache")
#: Attributes of attention modules that say which layers of a cache they read and fill.
_INDICES = ("layer_idx", "kv_shared_layer_index")


def is_cache(value: object) -> bool:
    """Whether ``value`` is one of transformers' caches; False as long as transformers is not loaded."""
    base = getattr(sys.modules.get(_MODULE), "Cache", None)
    return isinstance(base, type) and isinstance(value, base)


def cache_layers_of(block: nn.Module) -> frozenset[int]:
    """Which layers of a cache ``block`` reads and fills; none where its modules do not say."""
    found = (_own(module, name) for module in block.modules() for name in _INDICES)
    return frozenset(index for index in found if isinstance(index, int))


def _own(module: nn.Module, name: str) -> object:
    """An attribute, or None: what a module does not have it is slow to say, and each call of a block asks."""
    if name in module.__dict__:
        return module.__dict__[name]
    return getattr(module, name, None) if hasattr(type(module), name) else None


def cache_is_empty(value: object, layers: frozenset[int] = frozenset()) -> bool:
    """Whether a cache holds no state of any layer, so that a forward without it gives the same output.

    ``layers``: only these count, if there are any. What other blocks have left is nothing to a block.

    A cache whose buffers exist but were never written (a static one) counts as not empty: telling would read
    from the device.

    Raises:
        TypeError: ``value`` is no cache.
    """
    if not is_cache(value):
        raise TypeError(f"{type(value).__name__} is not a cache of transformers; ask is_cache first")
    parts = [part for name in _PARTS if is_cache(part := getattr(value, name, None))]
    if parts:
        return all(cache_is_empty(part, layers) for part in parts)
    own = getattr(value, "layers", ())
    if layers:
        own = [one for index, one in enumerate(own) if index in layers]
    return not any(_holds_state(layer) for layer in own)


def refuse_caches(verb: str, batch: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """For what runs the model on ``batch`` several times.

    Raises:
        ArgumentError: it holds a cache, which the first run would fill.
    """
    if any(is_cache(leaf) for leaf in leaves_of(batch)):
        raise ArgumentError(
            f"{verb} runs the model on the batch several times, and the key/value cache in it would be filled by the "
            "first: leave it out (training needs none)"
        )


def parts_of(cache: Any) -> list[Any]:
    """``cache`` itself and the caches that it holds."""
    return [cache, *(part for name in _PARTS if is_cache(part := getattr(cache, name, None)))]


def own_copy(value: Any, layers: frozenset[int] = frozenset()) -> Any:
    """A copy of a cache that is empty in ``layers`` (none: in all), to be filled there without a trace."""
    if not cache_is_empty(value):
        return _copy_of_layers(value, layers)
    # There are as many layers as blocks, and each block asks: what can be is made anew by hand.
    made = {id(one): _anew(one) for part in parts_of(value) for one in getattr(part, "layers", ()) if _is_plain(one)}
    marks = {id(one): one for part in parts_of(value) for one in vars(part).values() if isinstance(one, frozenset)}
    return copy.deepcopy(value, made | marks)


def _is_plain(layer: object) -> bool:
    """All that it holds is replaced, and never changed, when it is filled."""
    return not hasattr(layer, "__deepcopy__") and not any(
        isinstance(item, (Tensor, Mapping, list, set, nn.Module)) for item in vars(layer).values()
    )


def _anew(layer: Any) -> Any:
    made = object.__new__(type(layer))
    made.__dict__.update(layer.__dict__)
    return made


def _copy_of_layers(value: Any, layers: frozenset[int]) -> Any:
    """A copy in which ``layers`` alone are new: others hold tensors with a graph, which are not written to."""
    made = copy.copy(value)
    for name in _PARTS:
        if is_cache(getattr(value, name, None)):
            setattr(made, name, own_copy(getattr(value, name), layers))
    if isinstance(getattr(value, "layers", None), list):
        made.layers = [copy.deepcopy(one) if index in layers else one for index, one in enumerate(value.layers)]
    if isinstance(getattr(value, "is_updated", None), dict):
        made.is_updated = dict(value.is_updated)
    return made


def _holds_state(layer: object) -> bool:
    """Whether a cache layer holds keys and values, or states by number (linear attention)."""
    for item in vars(layer).values():
        if isinstance(item, Tensor):
            if _is_state(item):
                return True
        elif isinstance(item, Mapping) and any(map(_is_state, item.values())):
            return True
    return False


def _is_state(item: object) -> bool:
    # States have a batch dimension and more; counters and window sizes kept as tensors do not.
    return isinstance(item, Tensor) and item.dim() >= 2 and item.numel() > 0
