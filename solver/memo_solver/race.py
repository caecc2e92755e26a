"""Runs searches beside each other, one lane a thread, and picks the winner by rank.

A lane is a list of searches done one after the other until one decides. The
first lane that decides stops the lanes after it; lanes before it run on to
their own limits, and the winner is the deciding lane of lowest rank. As efforts
are counted in nodes and not in seconds, the winner does not depend on how fast
the machine is, unless the deadline cuts a lane short.

A lane that was told to stop may need a second for it (importing OR-Tools, CP-SAT's
presolve). Nobody waits for that: its result no longer matters. Only the end of the
program does, since a library must not be torn down under a thread that is in it.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memo_solver.outcome import Outcome, SearchResult, StopFlag

Search = Callable[[StopFlag], SearchResult]
POLL_SECONDS = 0.05
"""How often the main thread wakes up, so that Ctrl-C is served at once."""
GRACE_SECONDS = 0.1
"""How long a race waits for lanes that were told to stop."""
EXIT_SECONDS = 20.0
"""How long the end of the program waits for the last of them."""

_LEFT_BEHIND: list[threading.Thread] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A named search that polls the flag it is given."""

    name: str
    run: Search


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The deciding result and the name of its task, or the last undecided one."""

    name: str
    result: SearchResult


def decides(result: SearchResult) -> bool:
    """Whether a result answers the question."""
    return result.outcome in (Outcome.FOUND, Outcome.INFEASIBLE)


class _Lane:
    """One thread that works through its tasks."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.flag = StopFlag()
        self.verdict: Verdict | None = None
        self.error: BaseException | None = None
        self._tasks = tasks
        self.thread = threading.Thread(target=self._work, daemon=True)

    @property
    def decided(self) -> bool:
        return self.verdict is not None and decides(self.verdict.result)

    def _work(self) -> None:
        try:
            for task in self._tasks:
                if self.flag.is_set():
                    return
                result = task.run(self.flag)
                self.verdict = Verdict(name=task.name, result=result)
                if decides(result):
                    return
        except BaseException as error:
            self.error = error


def race(lanes: Sequence[Sequence[Task]], deadline: float = math.inf) -> Verdict | None:
    """Run all lanes; None when none decided. A KeyboardInterrupt stops them and goes on up.

    At `deadline` (of `time.monotonic`) all are told to stop.
    """
    running = [_Lane(tasks) for tasks in lanes if tasks]
    for lane in running:
        lane.thread.start()
    try:
        for rank, lane in enumerate(running):
            while lane.thread.is_alive():
                lane.thread.join(POLL_SECONDS)
                if time.monotonic() > deadline:
                    _stop(running)
                    _leave(running)
                    break
                _stop_after_first_decided(running)
            if lane.error is not None or lane.decided:
                _stop(running[rank + 1 :])
                break
    except BaseException:
        _stop(running)
        raise
    finally:
        _leave(running)
    for lane in running:
        if lane.error is not None:
            raise lane.error
        if lane.decided:
            return lane.verdict
    return None


def _leave(running: Sequence[_Lane]) -> None:
    """Wait a moment for lanes that were told to stop, then go on without them."""
    until = time.monotonic() + GRACE_SECONDS
    for lane in running:
        lane.thread.join(max(until - time.monotonic(), 0.0))
    _LEFT_BEHIND[:] = [thread for thread in _LEFT_BEHIND if thread.is_alive()]
    _LEFT_BEHIND.extend(lane.thread for lane in running if lane.thread.is_alive())


@atexit.register
def _wait_at_exit() -> None:
    until = time.monotonic() + EXIT_SECONDS
    for thread in _LEFT_BEHIND:
        thread.join(max(until - time.monotonic(), 0.0))


def _stop_after_first_decided(running: Sequence[_Lane]) -> None:
    for rank, lane in enumerate(running):
        if lane.decided:
            _stop(running[rank + 1 :])
            return


def _stop(lanes: Sequence[_Lane]) -> None:
    for lane in lanes:
        lane.flag.set()
