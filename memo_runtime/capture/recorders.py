"""Hooks by which transformers records outputs of inner modules: what ``output_attentions=True`` and the like ask for.

They are registered by the first call that asks and stay for good. In calls that ask for nothing each returns at once,
so that a block with such hooks is the block without them. Found without importing transformers.
"""

from __future__ import annotations

import sys
from typing import Any

_MODULE = "transformers.utils.output_capturing"


def recorded_now() -> frozenset[str]:
    """The kinds of outputs that are being recorded on this thread, such as "attentions"."""
    collector = getattr(sys.modules.get(_MODULE), "_active_collector", None)
    return frozenset(collector.get() or ()) if collector is not None else frozenset()


def is_idle(hook: Any) -> bool:
    """Whether ``hook`` is one of them and returns at once as things are."""
    if getattr(hook, "__module__", None) != _MODULE or not hasattr(sys.modules.get(_MODULE), "_active_collector"):
        return False
    recorded = recorded_now()
    return not recorded or _records(hook) not in (None, *recorded)


def _records(hook: Any) -> str | None:
    """The kind of output that ``hook`` records; None: not known."""
    names = getattr(getattr(hook, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, getattr(hook, "__closure__", None) or (), strict=False))
    return cells["key"].cell_contents if "key" in cells else None
