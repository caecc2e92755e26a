"""Weights that parametrizations have computed under ``torch.nn.utils.parametrize.cached()``, which PyTorch keeps in a
global table: what a forward has put there, any other run of the block would find, with the graph of that forward.

A rerun starts from what was there at its forward, the runs of a profile from what was there at the block's call, and
runs of copies (captures) from nothing. Afterwards there is what was there before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.nn.utils import parametrize

from memo_runtime.blocks.undo import Undo


@dataclass(frozen=True, slots=True)
class ComputedWeights:
    """How many ``cached()`` are open, and the weights that were computed in them."""

    open: int = 0
    table: dict[tuple[int, str], Any] = field(default_factory=dict)

    @classmethod
    def current(cls) -> ComputedWeights:
        """Those that are there."""
        if not parametrize._cache_enabled:
            return NO_WEIGHTS
        return cls(parametrize._cache_enabled, dict(parametrize._cache))

    def mapped(self, function: Callable[[Any], Any]) -> ComputedWeights:
        """With ``function`` of each."""
        return ComputedWeights(self.open, {key: function(one) for key, one in self.table.items()})

    def set(self) -> None:
        """Make them those that are there."""
        if self.open or parametrize._cache_enabled:
            parametrize._cache_enabled, parametrize._cache = self.open, dict(self.table)

    def restored(self) -> contextlib.AbstractContextManager[object]:
        """Run from these, then put back those from before."""
        return self._restored() if self.open or parametrize._cache_enabled else contextlib.nullcontext()

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        undo = Undo(ComputedWeights.current().set)
        try:
            self.set()
            yield
        finally:
            undo()


#: Every weight is computed where it is read.
NO_WEIGHTS = ComputedWeights()
