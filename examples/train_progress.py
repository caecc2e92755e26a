"""What a training run says: lines and a progress bar on stderr, one JSON line on stdout.

The bar is there only on a terminal, and never where NO_COLOR is set; the lines are the same either way.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import checkout  # noqa: F401
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from train_options import Options

from memo_runtime.reporting.mfu import utilization
from memo_runtime.reports import Report
from memo_runtime.units import format_bytes, format_seconds

_COLUMNS = "{:>4} {:>8} {:>9} {:>6} {:>9} {:>9} {:>9} {:>10} {:>10} {:>10} {:>10} {:>6}"
_NAMES = (
    ("", "", "", "", "", "forward,", "", "device", "", "host", "swapped", "FLOPs"),
    (
        "step",
        "loss",
        "tokens/s",
        "MFU",
        "time",
        "backward",
        "forecast",
        "peak",
        "forecast",
        "memory",
        "to host",
        "again",
    ),
)
HEADER = "\n".join(_COLUMNS.format(*names) for names in _NAMES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step: its loss, its wall-clock seconds, and what the runtime says about it."""

    index: int
    loss: float
    seconds: float
    report: Report | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one optimizer step is: tokens and model FLOPs, in ``passes`` forwards, on the device named."""

    tokens: int
    flops: int
    passes: int
    device_name: str


def step_line(step: Step, workload: Workload) -> str:
    """``step`` as a line under ``HEADER``; '-' where something is unknown or not counted.

    The runtime measures and forecasts forward and backward; the time of the step has the optimizer in it too.
    """
    mfu = utilization(workload.flops, step.seconds, workload.device_name)
    cells = [
        str(step.index + 1),
        f"{step.loss:.4f}",
        f"{workload.tokens / step.seconds:,.0f}",
        "-" if mfu is None else f"{mfu:.1%}",
        format_seconds(step.seconds),
    ]
    if step.report is None:
        return _COLUMNS.format(*cells, *["-"] * 7)
    totals = step.report.totals
    forecast = totals.forecast
    return _COLUMNS.format(
        *cells,
        _shown(totals.step_seconds * workload.passes, format_seconds),
        _shown(forecast.step_seconds * workload.passes, format_seconds),
        _shown(totals.peak_bytes, format_bytes),
        _shown(forecast.peak_bytes, format_bytes),
        _shown(totals.host_bytes, format_bytes),
        _shown(totals.bytes_to_host * workload.passes, format_bytes),
        _shown(totals.recomputed_flops * workload.passes / workload.flops, "{:.1%}".format),
    )


def _shown(value: float, form: Callable[[float], str]) -> str:
    return form(value) if value else "-"


def largest_difference(losses: Sequence[float], reference: Sequence[float]) -> float | None:
    """Largest relative difference of the steps that both runs did; None where there is none, or no number."""
    pairs = list(zip(losses, reference, strict=False))
    if not pairs:
        return None
    # max() drops a NaN or not depending on where it stands.
    differences = [abs(loss - other) / abs(other) if other else abs(loss) for loss, other in pairs]
    return max(differences) if all(map(math.isfinite, differences)) else None


def summarize(steps: Sequence[Step], workload: Workload | None) -> dict[str, Any]:
    """The measured fields of the JSON line.

    Bytes and FLOPs are those of the last forward and backward, peaks the highest of all steps. Seconds are
    the median without the first step, which profiles and plans.
    """
    steady = [step.seconds for step in steps[1:]] or [step.seconds for step in steps]
    seconds = statistics.median(steady) if steady else None
    totals = [step.report.totals for step in steps if step.report is not None]
    last = totals[-1] if totals else None
    rate = mfu = None
    if seconds and workload is not None:
        rate = workload.tokens / seconds
        mfu = utilization(workload.flops, seconds, workload.device_name)
    forecast = None
    # Under policy 'none' there is a report, and no plan behind it.
    if last is not None and last.forecast.peak_bytes:
        names = ("step_seconds", "peak_bytes", "host_bytes")
        forecast = {name: getattr(last.forecast, name) for name in names}
    return {
        "losses": [step.loss if math.isfinite(step.loss) else None for step in steps],
        "bytes_to_host": last.bytes_to_host if last else 0,
        "recomputed_flops": last.recomputed_flops if last else 0,
        "peak_bytes": max((total.peak_bytes for total in totals), default=0) or None,
        "host_bytes": max((total.host_bytes for total in totals), default=None),
        "step_seconds": seconds,
        "tokens_per_second": rate,
        "mfu": mfu,
        "forecast": forecast,
    }


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a run has to show so far; complete or not, it is what the JSON line says."""

    options: Options
    seq_len: int | None = None
    workload: Workload | None = None
    steps: list[Step] = field(default_factory=list)
    reference: list[Step] = field(default_factory=list)

    def difference(self) -> float | None:
        """Largest relative loss difference to the unwrapped run, where there is one."""
        losses, reference = ([step.loss for step in steps] for steps in (self.steps, self.reference))
        return largest_difference(losses, reference)


def result_line(outcome: Outcome) -> str:
    """The JSON line: what was asked, and what was measured so far."""
    options, steps, workload = outcome.options, outcome.steps, outcome.workload
    report = steps[-1].report if steps else None
    result = {
        **summarize(steps, workload),
        "max_rel_loss_diff": outcome.difference(),
        "geometry": options.geometry,
        "policy": report.policy if report is not None else options.policy,
        "seq_len": outcome.seq_len or options.seq_len,
        "steps": len(steps),
        "seconds": [step.seconds for step in steps],
        "peak_reserved": torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else None,
        "host_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "budget": options.budget,
        "host_budget": options.host_budget,
        "device": workload.device_name if workload is not None else options.device,
        "torch": torch.__version__,
    }
    return json.dumps(result, allow_nan=False)


class Talk:
    """Lines on stderr, and under them a progress bar where stderr is a terminal."""

    def __init__(self, steps: int) -> None:
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("starting", total=steps)

    def __enter__(self) -> Talk:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def line(self, text: str) -> None:
        """Says ``text``."""
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def phase(self, text: str) -> None:
        """Names what the bar shows."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.advance(self._task)


class TalkHandler(logging.Handler):
    """Log records as lines, above the bar instead of through it."""

    def __init__(self, talk: Talk) -> None:
        super().__init__()
        self._talk = talk
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Says the record."""
        self._talk.line(self.format(record))
