"""Key/value caches of Hugging Face models, recognised by type: their argument name differs between releases."""

from __future__ import annotations

import sys
from typing import Any


def is_cache(value: Any) -> bool:
    """``value`` is a transformers key/value cache. Never imports transformers."""
    module = sys.modules.get("transformers.cache_utils")
    if module is None:
        return False
    kinds = tuple(getattr(module, name) for name in ("Cache", "EncoderDecoderCache") if hasattr(module, name))
    return isinstance(value, kinds)


def cache_is_empty(cache: Any) -> bool:
    """A cache that holds no tokens yet, as in the first forward of a training step."""
    length = cache.get_seq_length()
    return int(length) == 0
