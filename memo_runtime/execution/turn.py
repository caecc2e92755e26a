"""Whose step it is. One wrapped model runs one step at a time: copies and reruns go by the order of its blocks.

Threads may take turns, forward and backward of one after those of another; a thread that comes in between is refused
before anything of the step that is under way is touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from memo_runtime.errors import MemoError


class Turn:
    """The thread whose step is the latest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None

    def take(self, under_way: Callable[[], bool]) -> None:
        """It is the calling thread's turn from now on; ``under_way`` tells whether the turn before is not over.

        Raises:
            MemoError: another thread, which is alive, is in the middle of its step.
        """
        me = threading.current_thread()
        with self._lock:
            self._refuse(me, under_way)
            self._owner = me

    def keep(self, thread: threading.Thread, under_way: Callable[[], bool]) -> None:
        """Go backward through an earlier step, which ``thread`` made. Raises as ``take``."""
        with self._lock:
            self._refuse(thread, under_way)

    def _refuse(self, thread: threading.Thread, under_way: Callable[[], bool]) -> None:
        owner = self._owner
        if owner is not None and owner is not thread and owner.is_alive() and under_way():
            raise MemoError(
                f"thread '{thread.name}' uses a wrapped model in the middle of a step of thread '{owner.name}': a "
                "wrapped model runs one step, forward and backward, at a time. Would work: a lock around forward and "
                "backward together, a model of its own for each thread (copy.deepcopy gives an unwrapped one to wrap), "
                "or memo.unwrap(model)"
            )
