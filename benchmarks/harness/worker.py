"""A contender's process: reads a job from its standard input, writes a measurement per length to its output.

Running out of memory is a measurement. The walk ends there, since longer lengths need more, unless each length has a
budget of its own; it ends as well after an error, and where the next length would not be done in time.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.harness.contenders import CONTENDERS
from benchmarks.harness.contenders.base import Contender
from benchmarks.harness.contenders.packages import SkippedError
from benchmarks.harness.geometry import UnknownGeometryError
from benchmarks.harness.job import Job
from benchmarks.harness.memory import cuda_peaks, host_facts, limit_memory, release, reset_peaks
from benchmarks.harness.own_files import refusal_of
from benchmarks.harness.reference import refer
from benchmarks.harness.rehearsing import rehearse
from benchmarks.harness.rows import REFERENCE
from benchmarks.harness.sketch import encode, norm, sketch
from benchmarks.harness.subject import OnGradients
from benchmarks.harness.timing import percentiles, predicted_seconds, step_counts, warms_up_by_rehearsal
from benchmarks.harness.tracing import traced_step
from memo_runtime.rehearsal.cpu_peak import cpu_peak
from memo_runtime.rehearsal.failure import ran_out
from memo_runtime.rehearsal.threads import is_of_a_thread
from memo_runtime.reporting.mfu import utilization

logger = logging.getLogger("benchmarks")

_MESSAGE_LIMIT = 600

Measurement = dict[str, Any]
Step = Callable[[OnGradients | None], None]


@dataclass(slots=True)
class _Gradients:
    """Norm and sketch of the gradients of one step."""

    facts: Measurement

    def __call__(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Called between backward and optimizer."""
        self.facts["gradient_norm"] = norm(gradients.values())
        self.facts["gradient_sketch"] = encode(sketch(gradients))


def _timed(contender: Contender) -> float:
    return _seconds_of(contender, contender.step)


def _seconds_of(contender: Contender, step: Step, on_gradients: OnGradients | None = None) -> float:
    started = time.perf_counter()
    step(on_gradients)
    if contender.device.type == "cuda":
        torch.cuda.synchronize(contender.device)
    return time.perf_counter() - started


def _warm_up(contender: Contender, job: Job, tokens: int, warm: int) -> Measurement:
    """The steps that are not measured: profiles, plans and pinning happen here, and gradients are looked at.

    Gradients are the first step's, before an optimizer made more of their last bits; its seconds contain that look.
    Where a step takes minutes, one step is rehearsed instead: profiles and plans are made with the real kernels.
    """
    rehearsed = warms_up_by_rehearsal(tokens)
    facts: Measurement = {"warm_up": 0 if rehearsed else warm}
    reset_peaks(contender.device)
    started = time.perf_counter()
    first = contender.rehearse if rehearsed else contender.step
    facts["first_step_seconds"] = _seconds_of(contender, first, _Gradients(facts) if tokens == job.sketch_at else None)
    facts["first_peak_allocated"] = cuda_peaks(contender.device).get("peak_allocated")
    for _ in range(facts["warm_up"] - 1):
        _timed(contender)
    facts["warm_up_seconds"] = time.perf_counter() - started
    return facts


def _throughput(contender: Contender, tokens: int, seconds: float) -> Measurement:
    name = torch.cuda.get_device_name(contender.device) if contender.device.type == "cuda" else "cpu"
    needed, repeated = contender.model_flops(tokens), contender.recomputed_flops(tokens)
    return {
        "model_flops": needed,
        "recomputed_flops": repeated,
        "mfu": utilization(needed, seconds, name),
        "hfu": None if repeated is None else utilization(needed + repeated, seconds, name),
    }


def measure(contender: Contender, job: Job, tokens: int) -> Measurement:
    """Everything about ``contender`` at ``tokens``."""
    steady, warm = step_counts(tokens, job.settings.steps)
    contender.start(tokens)
    facts = _warm_up(contender, job, tokens, max(1, warm))
    reset_peaks(contender.device)
    seconds = [_timed(contender) for _ in range(steady)]
    facts |= {"status": "ok", "seq_len": tokens, "rehearsed": False, "seconds": seconds, **percentiles(seconds)}
    facts |= cuda_peaks(contender.device) | host_facts(contender.device)
    if facts["pinned_bytes"] is not None:
        facts["pinned_bytes"] += contender.pinned_bytes()
    facts |= _throughput(contender, tokens, facts["step_seconds"])
    facts["details"] = contender.details()
    if job.traces is not None:
        facts["details"]["trace"] = traced_step(contender, Path(f"{job.traces}-{tokens}.json.gz"))
    if contender.device.type == "cpu":
        facts["peak_allocated"] = cpu_peak(contender.step, contender.resident_bytes())
    return facts


def _failure(job: Job, tokens: int, error: BaseException, device: torch.device) -> Measurement:
    status = "skipped" if isinstance(error, SkippedError) else "oom" if ran_out(error) else "error"
    words = "no more memory" if isinstance(error, MemoryError) else ""
    message = f"{type(error).__name__}: {str(error).strip() or words}"
    if status == "oom" and is_of_a_thread(error):
        message += " (there is no memory for the stack of a thread)"
    message = message[:_MESSAGE_LIMIT]
    facts: Measurement = {"status": status, "seq_len": tokens, "error": message, "rehearsed": job.settings.rehearse}
    if device.type == "cuda" and torch.cuda.is_initialized():
        facts |= cuda_peaks(device) | host_facts(device)
    return facts


def _measured(contender: Contender, job: Job, tokens: int) -> Measurement:
    """What ``measure`` says; memory that a budget of this length alone was short of is a measurement too."""
    try:
        return (rehearse if job.settings.rehearse else measure)(contender, job, tokens)
    except Exception as error:
        if not (job.own_budgets and ran_out(error)):
            raise
        return _failure(job, tokens, error, contender.device)


class _Clock:
    """Decides whether another length can be done before the deadline."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._before: tuple[int, float, float] | None = None

    def allows(self, tokens: int) -> bool:
        """Whether ``tokens`` will be done in time; the first length always begins."""
        if self._job.deadline is None or self._before is None:
            return True
        needed = predicted_seconds(*self._before, tokens=tokens, cap=self._job.settings.steps)
        return time.time() + needed <= self._job.deadline

    def note(self, facts: Measurement, elapsed: float) -> None:
        """What the length that was just done took in all."""
        if facts["rehearsed"]:  # no step grows with the square
            self._before = (facts["seq_len"], 0.0, elapsed)
            return
        steps = sum(step_counts(facts["seq_len"], self._job.settings.steps))
        other = max(0.0, elapsed - steps * facts["step_seconds"])
        self._before = (facts["seq_len"], facts["step_seconds"], other)


def walk(job: Job, out: TextIO) -> None:
    """Measure the lengths of ``job`` upward and write a line for each; or one that says why nobody can."""

    def emit(facts: Measurement) -> None:
        out.write(json.dumps(facts) + "\n")
        out.flush()

    device, clock = torch.device(job.settings.device), _Clock(job)
    tokens, contender = job.lengths[0], None
    try:
        if job.contender == REFERENCE:
            if (found := refer(job)) is not None:
                emit(found)
            return
        if job.settings.memory is not None and device.type == "cuda":
            limit_memory(job.settings.memory, device)
        contender = CONTENDERS[job.contender](job)
        if job.settings.memory is not None and device.type == "cpu":
            # Where nothing tells tensors from libraries, what is there once the model is does not count.
            limit_memory(job.settings.memory, device)
        for tokens in job.lengths:
            if not clock.allows(tokens):
                return
            started = time.perf_counter()
            facts = _measured(contender, job, tokens)
            emit(facts)
            contender.finish()
            release(device)
            if facts["status"] == "ok":
                clock.note(facts, time.perf_counter() - started)
    except UnknownGeometryError as error:  # nobody's result: no contender could be measured
        emit({"refused": str(error)})
    except Exception as error:  # whatever a contender does wrong is its result, and the others go on
        if (refused := refusal_of(error)) is not None:
            emit({"refused": refused})
            return
        if not (ran_out(error) or isinstance(error, SkippedError)):
            traceback.print_exc()
        emit(_failure(job, tokens, error, device))
    finally:
        if contender is not None:
            _close(contender)


def _close(contender: Contender) -> None:
    """All is measured: what goes wrong now is no result."""
    try:
        contender.close()
    except Exception:
        logger.warning("%s could not be closed", type(contender).__name__, exc_info=True)


def main() -> int:
    """Do the job on standard input."""
    # Results have the output for themselves: what libraries print goes where talk goes.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
        walk(Job.from_json(sys.stdin.read()), out)
    return 0

