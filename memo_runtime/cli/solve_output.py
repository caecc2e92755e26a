"""What ``memo solve`` shows: a live line on a terminal, then a summary."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from memo_runtime.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from pathlib import Path

    from memo_solver.params import Progress
    from memo_solver.records import Solution

_REFRESH_SECONDS = 0.1


class ProgressLine:
    """One line on stderr with incumbent, bound, gap and time; silent when stderr is no terminal."""

    def __init__(self) -> None:
        self._live = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._last = 0.0

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def __call__(self, state: Progress) -> None:
        """Shows the state, ten times a second at most."""
        now = time.monotonic()
        if not self._live or now - self._last < _REFRESH_SECONDS:
            return
        self._last = now
        peak = "none yet" if state.peak is None else format_bytes(state.peak)
        gap = (
            ""
            if not state.peak or not state.lower_bound
            else f"  gap {state.peak / state.lower_bound - 1:.2%}"
        )
        bound = format_bytes(state.lower_bound)
        sys.stderr.write(f"\r\x1b[K{state.stage}: peak {peak}  bound {bound}{gap}  {state.seconds:.1f} s")
        sys.stderr.flush()


def summary_json(solution: Solution) -> dict[str, Any]:
    """The solution as one JSON object; offsets by id."""
    proof = solution.proof
    return {
        "status": solution.status.value,
        "peak": solution.peak,
        "lower_bound": solution.lower_bound,
        "gap": solution.gap,
        "seconds": solution.seconds,
        "interrupted": solution.interrupted,
        "proof": None
        if proof is None
        else {
            "bound": proof.bound,
            "reason": proof.reason,
            "time": proof.time,
            "requests": list(proof.request_ids),
        },
        "stages": [
            {"name": s.name, "seconds": s.seconds, "peak": s.peak, "note": s.note} for s in solution.stages
        ],
        "offsets": None if solution.placement is None else solution.placement.by_id(),
    }


def summary_text(solution: Solution, *, written_to: Path | None) -> str:
    """A few lines for people; the first one is complete alone."""
    bound = f"bound {solution.lower_bound} ({format_bytes(solution.lower_bound)})"
    head = f"# {solution.status.value}: "
    if solution.placement is not None and solution.placement.problem.capacity is not None:
        head += f"fits in {solution.placement.problem.capacity}, "
    if solution.peak is not None:
        head += f"peak {solution.peak} ({format_bytes(solution.peak)}), {bound}, gap {solution.gap:.3%}"
    else:
        head += f"no placement, {bound}"
    lines = [f"{head}, {format_seconds(solution.seconds)}{' (interrupted)' if solution.interrupted else ''}"]
    proof = solution.proof
    if proof is not None and proof.request_ids and solution.placement is None:
        shown = ", ".join(proof.request_ids[:8])
        more = f" and {len(proof.request_ids) - 8} more" if len(proof.request_ids) > 8 else ""
        what = "proof" if solution.status.value == "infeasible" else "bound"
        lines.append(f"# {what}: at time {proof.time} these need {proof.bound}: {shown}{more}")
        lines.append(f"#   {proof.reason}")
    elif proof is not None and solution.placement is None:
        lines.append(f"# bound proved by: {proof.reason}")
    lines += [f"#   {s.name:24} {format_seconds(s.seconds):>10}  {s.note}" for s in solution.stages]
    if written_to is not None:
        done = "written to" if solution.placement is not None else "nothing written to"
        lines.append(f"# {done} {written_to}")
    return "\n".join(lines)
