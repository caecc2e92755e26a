"""The process that rehearses for ``memo fit --rehearse``, seen from the one that asks it.

It keeps its model, what it was profiled to take, its programs and the host memory that it has pinned from one length to
the next, which take longer than a step. Only memory that was short in a step ends it: the next length has a fresh one.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import IO, Any, Self

from memo_runtime.cli.rehearsal_trial import Trial
from memo_runtime.errors import RehearsalError
from memo_runtime.rehearsal.nearby import OutOfTimeError
from memo_runtime.rehearsal.record import Rehearsal

_KILLED = "killed by signal 9, as processes are when host memory runs out"
#: Forecasts, and so plans to be rehearsed, are made for an allocator that joins free memory.
_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
_ALLOCATORS = (_ALLOCATOR, "PYTORCH_ALLOC_CONF")


def _nothing(_: str) -> None:
    """Nobody is told."""


class RehearsalProcess:
    """Rehearses trials of one model, in a process that is started when it is needed.

    Args:
        progress: told what it does. deadline: of ``time.monotonic``, after which nothing is waited for.
    """

    def __init__(self, *, progress: Callable[[str], None] = _nothing, deadline: float | None = None) -> None:
        self.progress, self._deadline = progress, deadline
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._talk: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start it, so that its libraries are there when it is asked."""
        if self._process is not None:
            return
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, "KINETO_LOG_LEVEL": "99"}
        if not any(os.environ.get(name) for name in _ALLOCATORS):
            environment[_ALLOCATOR] = "expandable_segments:True"
        self._talk = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "memo_runtime.cli.rehearsal_trial"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._talk, text=True, env=environment,
        )  # fmt: skip
        self._lines = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True).start()

    def plan(self, trial: Trial) -> Rehearsal | None:
        """How ``trial`` ends for want of a plan; None: it has one.

        Raises:
            RehearsalError, OutOfTimeError: as ``rehearse``.
        """
        return self._asked(trial, only_plan=True)

    def rehearse(self, trial: Trial) -> Rehearsal:
        """A step of ``trial``.

        Raises:
            RehearsalError: it could not be made; says why.
            OutOfTimeError: the deadline has come first.
        """
        found = self._asked(trial, only_plan=False)
        assert found is not None, "a step has an outcome"
        return found

    def close(self) -> None:
        """End it, whatever it does."""
        process, talk, self._process, self._talk = self._process, self._talk, None, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    _close(pipe)
        if talk is not None:
            talk.close()

    def _asked(self, trial: Trial, *, only_plan: bool) -> Rehearsal | None:
        self.start()
        process = self._process
        assert process is not None, "it was started"
        assert process.stdin is not None, "it is asked through a pipe"
        try:
            process.stdin.write(json.dumps({"trial": json.loads(trial.to_json()), "only_plan": only_plan}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self._ended(trial)
        while (line := self._next_line()) is not None:
            try:
                found: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            if "progress" in found:
                self.progress(found["progress"])
                continue
            if found.get("over") or "refused" in found:
                self.close()
            if "refused" in found:
                raise RehearsalError(f"{trial.tokens:,} tokens could not be rehearsed: {found['refused']}")
            return None if found["rehearsal"] is None else Rehearsal.from_dict(found["rehearsal"])
        return self._ended(trial)

    def _next_line(self) -> str | None:
        """None: it has ended."""
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        try:
            return self._lines.get(timeout=left)
        except queue.Empty:
            self.close()
            raise OutOfTimeError from None

    def _ended(self, trial: Trial) -> Rehearsal:
        """What it means that the process is there no more."""
        process, talk = self._process, self._talk
        assert process is not None, "it was started"
        assert talk is not None, "it talks into a file"
        code = process.wait()
        talk.seek(0)
        last = (talk.read().strip().splitlines() or ["it said nothing"])[-1]
        self.close()
        if code == -signal.SIGKILL:
            return Rehearsal.short(phase="host", where="somewhere in the step", error=_KILLED)
        raise RehearsalError(f"the rehearsal of {trial.tokens:,} tokens ended with {code}: {last}")


def _read(pipe: IO[str] | None, lines: queue.SimpleQueue[str | None]) -> None:
    try:
        for line in pipe or ():
            lines.put(line)
    except ValueError:  # it was closed meanwhile
        pass
    finally:
        lines.put(None)


def _close(pipe: IO[str]) -> None:
    with contextlib.suppress(BrokenPipeError):
        pipe.close()
