"""Our own operators in the middle of a block's run: the modes that count and replace the block's must not see them.

Taking the modes off and putting them back, as PyTorch's helper does, is not safe from an interrupt: its generator is
closed when the traceback is forgotten, and puts the mode of a rerun back in the middle of another step.
"""

from __future__ import annotations

import threading
from typing import Self


class _Depth(threading.local):
    count = 0


DEPTH = _Depth()


class Aside:
    """Inside, ``is_aside`` holds on this thread."""

    __slots__ = ()

    def __enter__(self) -> Self:
        DEPTH.count += 1
        return self

    def __exit__(self, *_: object) -> None:
        DEPTH.count -= 1


def is_aside() -> bool:
    """What runs now is no operator of a block."""
    return DEPTH.count > 0
