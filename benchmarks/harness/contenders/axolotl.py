"""The combination that Axolotl ships, from public pieces of PyTorch: inputs of blocks and what attention returned go
to pinned host memory, all else runs again in backward.

Checkpointing as in ``selective``, but what its policy keeps is sent to the host, and so are the inputs that the
checkpoint itself keeps. The block below is brought back while a block's backward runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness.contenders.base import BlockForward, Training, replace_forwards
from benchmarks.harness.contenders.checkpoint import checkpointed
from benchmarks.harness.contenders.host_copies import UNDER_WAY, HostCopies, Sent
from benchmarks.harness.contenders.selective import ATTENTION
from benchmarks.harness.subject import OnGradients

#: Smaller results of attention stay on the device: seeds, and whatever else a kernel hands to its backward.
SMALLEST = 1 << 20


@dataclass(slots=True, eq=False)
class _Kept:
    """What one call of a block has on the host: its input, and the results of attention in order."""

    below: _Kept | None
    hidden: Sent | None = None
    attention: deque[Any] = field(default_factory=deque)

    def sent(self) -> list[Sent]:
        """All of it."""
        results = [one for result in self.attention for one in result]
        return [one for one in (self.hidden, *results) if isinstance(one, Sent)]


class _ToHost(TorchDispatchMode):
    """In forward: what attention returns is also sent to the host."""

    def __init__(self, keep: Callable[[Any], None]) -> None:
        super().__init__()
        self._keep = keep

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs everything."""
        result = func(*args, **(kwargs or {}))
        if func in ATTENTION:
            self._keep(result)
        return result


class _FromHost(TorchDispatchMode):
    """In the rerun: attention does not run."""

    def __init__(self, take: Callable[[], Any]) -> None:
        super().__init__()
        self._take = take

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs everything but attention."""
        return self._take() if func in ATTENTION else func(*args, **(kwargs or {}))


class Axolotl(Training):
    """Inputs of blocks and results of attention on the host, the rest recomputed."""

    def install(self) -> None:
        """Every block under such a checkpoint."""
        super().install()
        self._copies = HostCopies(self.device)
        self._last: _Kept | None = None
        self.settings |= {
            "host": ["layer inputs", "attention outputs"], "recompute": "the rest", "prefetch_blocks": 1,
            "under_way": UNDER_WAY, "smallest_bytes": SMALLEST,
        }  # fmt: skip
        replace_forwards(self.subject.layers, lambda forward: partial(self._block, forward))

    def step(self, on_gradients: OnGradients | None = None) -> None:
        """A step begins with no block below its first."""
        self._last = None
        super().step(on_gradients)

    def finish(self) -> None:
        """Also of what it has pinned for this length."""
        super().finish()
        self._copies.forget()

    def recomputed_flops(self, tokens: int) -> int:
        """Every block's products once more."""
        return self.subject.shape.rerun_flops(tokens, attention=False)

    def _block(self, forward: BlockForward, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kept = self._last = _Kept(below=self._last)
        start = hidden.data_ptr()

        def pack(tensor: torch.Tensor) -> Any:
            # Rotary tables, which the checkpoint keeps too, are all blocks' and stay.
            if tensor.data_ptr() != start:
                return tensor
            kept.hidden = self._copies.send(tensor)
            return kept.hidden

        def unpack(packed: Any) -> torch.Tensor:
            return self._returned(kept) if isinstance(packed, Sent) else packed

        with saved_tensors_hooks(pack, unpack):
            return checkpointed(forward, hidden, *args, **kwargs, context_fn=lambda: self._contexts(kept))

    def _returned(self, kept: _Kept) -> torch.Tensor:
        """The block's input, everything else of it and of the block below on its way."""
        for one in (kept, kept.below):
            for sent in one.sent() if one is not None else ():
                self._copies.prefetch(sent)
        assert kept.hidden is not None, "it was packed"
        hidden = self._copies.fetch(kept.hidden)
        kept.below = kept.hidden = None
        return hidden

    def _contexts(self, kept: _Kept) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return _ToHost(partial(self._keep, kept)), _FromHost(partial(self._take, kept))

    def _keep(self, kept: _Kept, result: Any) -> None:
        parts = result if isinstance(result, (tuple, list)) else (result,)
        kept.attention.append([self._copies.send(part) if _goes(part) else part for part in parts])

    def _take(self, kept: _Kept) -> Any:
        parts = kept.attention.popleft()
        found = tuple(self._copies.fetch(part) if isinstance(part, Sent) else part for part in parts)
        return found if len(found) > 1 else found[0]


def _goes(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.nbytes >= SMALLEST
