"""Solving in a process of its own, so that training goes on meanwhile.

    python -m memo_runtime.arena.solving TRACE RESULT SECONDS

reads a trace and writes where its last step's requests go. It needs neither torch nor a GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from memo_runtime.errors import AllocatorPlanError
from memo_runtime.placement import PlacedRequest
from memo_runtime.planning.layout import plan_layout
from memo_runtime.traces.trace import Trace
from memo_runtime.traces.trace_file import load_trace, save_trace

#: Of the solver; training goes on with the other cores.
_THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """What of a layout crosses from process to process; see ``planning.layout.Layout``."""

    rows: tuple[PlacedRequest, ...]
    placed: tuple[int, ...]
    peak: int
    lower_bound: int
    resident_bytes: int
    seconds: float


class Solving:
    """A trace that is being solved; ``close`` ends that."""

    def __init__(self, trace: Trace, *, seconds: float) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="memo_runtime_"))
        self._result = self._folder / "result.json"
        save_trace(trace, self._folder / "trace.json.gz")
        command = [sys.executable, "-m", "memo_runtime.arena.solving"]
        arguments = [str(self._folder / "trace.json.gz"), str(self._result), str(seconds)]
        self._said = (self._folder / "said.txt").open("wb")
        self._process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )

    @property
    def done(self) -> bool:
        """Whether ``result`` will not wait."""
        return self._process.poll() is not None

    def wait(self) -> None:
        """Until it is done."""
        self._process.wait()

    def result(self) -> Solved:
        """What was found.

        Raises:
            AllocatorPlanError: the process failed; says how.
        """
        code = self._process.wait()
        try:
            if code != 0:
                said = (self._folder / "said.txt").read_text(encoding="utf-8", errors="replace").strip()
                raise AllocatorPlanError(f"placing the step's memory failed (exit code {code}): {said[-500:]}")
            values = json.loads(self._result.read_text(encoding="utf-8"))
            rows = tuple(PlacedRequest(**row) for row in values.pop("rows"))
            return Solved(rows=rows, placed=tuple(values.pop("placed")), **values)
        finally:
            self.close()

    def close(self) -> None:
        """End it and leave no file behind."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._said.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def main(trace: str, result: str, seconds: str) -> None:
    """Solve."""
    os.nice(5)
    layout = plan_layout(load_trace(trace), seconds=float(seconds), threads=min(_THREADS, os.cpu_count() or 1))
    solved = Solved(
        rows=layout.rows,
        placed=layout.placed,
        peak=layout.peak,
        lower_bound=layout.lower_bound,
        resident_bytes=layout.resident_bytes,
        seconds=layout.seconds,
    )
    Path(result).write_text(json.dumps(asdict(solved)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
