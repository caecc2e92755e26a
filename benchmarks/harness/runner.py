"""Runs contenders one after the other, each in its own process, and writes their rows. Needs no torch.

Whatever happens to a contender's process is a row: its own report, or how it ended. What is in the file is not
measured again, so that the same command goes on after an interruption or after ``--minutes``.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass

from benchmarks.harness import ending, forecast, provenance
from benchmarks.harness.bound import held_back, terminable
from benchmarks.harness.ending import LastWords
from benchmarks.harness.host_guard import HostGuard
from benchmarks.harness.job import WIDER, Job
from benchmarks.harness.longest import next_lengths
from benchmarks.harness.names import Entry
from benchmarks.harness.options import Options, parse_options
from benchmarks.harness.own_files import RefusedError, refusal
from benchmarks.harness.rows import REFERENCE, Row, RowError, RowFile, held, make_row, read_rows
from benchmarks.harness.sketch import relative_difference
from benchmarks.harness.table import first_line, run_table
from benchmarks.harness.timing import warms_up_by_rehearsal

DONE, FAILED, USAGE, NOT_IN_TIME, INTERRUPTED = 0, 1, 2, 4, 130
#: Whose gradients the others are compared with where there is no wider reference.
PLAIN = "unwrapped"
#: Largest relative L2 distance of gradients from the reference's: rounding stays far below, and mistakes do not. Where
#: plain PyTorch in the run's dtype is farther from it, twice as far as that is taken, and never more than ``_MOST``
#: times as much, which is what unwrapped may be off by.
TOLERANCE = {"bfloat16": 0.05, "float16": 0.01, "float32": 1e-4, "float64": 1e-10}
_MOST = 5

#: How long last words are waited for, where what the process started may still hold its talk.
_SECONDS_OF_WORDS = 2.0


def say(text: str) -> None:
    """Talk: not a result."""
    print(text, file=sys.stderr, flush=True)


@dataclass(slots=True)
class Child:
    """A contender's process: an iterator over what it measures, which ends with it.

    It is killed at the job's deadline, when host memory is short, and when the iterator is left early.
    """

    job: Job
    overdue: bool = False
    returned: int | None = None
    said: tuple[str, ...] = ()
    guard: HostGuard | None = None

    def __iter__(self) -> Generator[Row]:
        """Measurements as they come."""
        command = [sys.executable, "-P", "-m", "benchmarks.harness.bound", str(os.getpid())]
        # As this process finds modules, whatever it was told; and the profiler need not say that it starts.
        paths = os.pathsep.join([str(provenance.ROOT), *(path for path in sys.path if path)])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = {**os.environ, "PYTHONPATH": paths, "KINETO_LOG_LEVEL": "99"}
        with held_back():
            process = subprocess.Popen(command, text=True, errors="replace", env=environment, **pipes)
        timer, words = self._timer(process), LastWords(process)
        self.guard = HostGuard(process, self.job.settings.host_memory)
        try:
            assert process.stdin is not None, "it is a pipe"
            assert process.stdout is not None, "it is a pipe"
            with suppress(BrokenPipeError):  # it has ended already, and how says why
                process.stdin.write(self.job.to_json())
                process.stdin.close()
            for line in process.stdout:
                if line.endswith("\n"):  # else it was killed while it wrote
                    yield json.loads(line)
            self.returned = process.wait()
        finally:
            if timer is not None:
                timer.cancel()
            self.guard.stop()
            process.kill()
            process.wait()
            self.said = words.wait(_SECONDS_OF_WORDS)

    def _timer(self, process: subprocess.Popen[str]) -> threading.Timer | None:
        if self.job.deadline is None:
            return None

        def stop() -> None:
            self.overdue = True
            process.kill()

        timer = threading.Timer(max(0.0, self.job.deadline - time.time()), stop)
        timer.daemon = True
        timer.start()
        return timer

    def failure(self) -> Row | None:
        """How the process ended, if that was not as it should and not our doing.

        Raises:
            RefusedError: it did not find the project.
        """
        if self.overdue or not self.returned:
            return None
        if self.said and (refused := refusal(self.said[-1])) is not None:
            raise RefusedError(refused)
        if self.guard is not None and (found := self.guard.failure()) is not None:
            return found
        settings = self.job.settings
        capped = settings.memory is not None and settings.device == "cpu"
        plenty = self.guard is not None and self.guard.saw_plenty()
        return ending.failure(self.returned, self.said, capped=capped, plenty=plenty)


@dataclass(slots=True)
class Runner:
    """One run: options, the file, and the conditions that all its rows share."""

    options: Options
    file: RowFile
    conditions: Row
    deadline: float | None = None
    tried_wider: bool = False

    @classmethod
    def of(cls, options: Options) -> Runner:
        """A run that goes on from what the file holds.

        Raises:
            RowError: rows of another schema, or of the same run under other conditions.
        """
        file = RowFile.open(options.out, options.run)
        if file.cut_off:
            say(f"{options.out}: dropped {file.cut_off} bytes of a row that was cut off; it is measured again")
        settings = options.settings
        conditions = {
            "geometry": settings.geometry,
            "scope": settings.scope.value,
            "blocks": settings.blocks,
            "config": options.config,
            "commit": options.commit,
            "versions": provenance.versions(),
            **provenance.machine(cuda=settings.device == "cuda"),
        }
        file.check_conditions(conditions)
        deadline = None if options.minutes is None else time.time() + 60 * options.minutes
        return cls(options, file, conditions, deadline)

    def budgets(self, entry: Entry, lengths: Sequence[int] = ()) -> dict[int, int]:
        """Device budget of ``entry`` by length; one of its own at ``lengths``, or at those of the run."""
        if entry.budget_from is None:
            own = self.options.budget if entry.budget is None else entry.budget
            given = own if entry.takes_budget else None
            return {} if given is None else dict.fromkeys(lengths or self.options.lengths, given)
        rows = [row for row in self.file.of(entry.budget_from) if row["status"] == "ok"]
        return {row["seq_len"]: row["peak_allocated"] for row in rows}

    def missing(self, entry: Entry) -> tuple[int, ...]:
        """Lengths at which ``entry`` is still to be measured.

        None from the shortest on that is not ok, and none at all of one that was skipped. One with a budget from
        another contender runs where that one did, and goes on after a budget that was too small: the next length has
        another.
        """
        rows = self.file.of(entry.label)
        if self.options.settings.rehearse:
            return next_lengths(rows, self.options.lengths[0], self.options.lengths[-1])
        harmless = ("ok",) if entry.budget_from is None else ("ok", "oom")
        if any(row["status"] == "skipped" for row in rows):
            return ()
        end = min((row["seq_len"] for row in rows if row["status"] not in harmless), default=math.inf)
        there = {row["seq_len"] for row in rows}
        possible = self.options.lengths if entry.budget_from is None else self.budgets(entry)
        if self.options.longest:
            possible = (self.options.longest[entry.label],)
        return tuple(one for one in self.options.lengths if one in possible and one not in there and one < end)

    def _why_not(self, entry: Entry) -> str:
        """What keeps ``entry`` from lengths that have no row, if something does."""
        rows = self.file.of(entry.label)
        there = {row["seq_len"] for row in rows if row["status"] == "ok"}
        ended = [row for row in rows if row["status"] != "ok"]
        if self.options.settings.rehearse:  # a search ends with lengths that do not fit
            ended = [row for row in ended if not there or row["status"] != "oom"]
        elif entry.budget_from is not None or there | {row["seq_len"] for row in ended} >= set(self.options.lengths):
            return ""
        row = min(ended, key=lambda row: int(row["seq_len"]), default=None)
        return "" if row is None else f" beyond {row['seq_len']:,} tokens, which is {row['status']}: see its row"

    def run(self) -> int:
        """Measure what is missing; an exit code."""
        looked_at = next((entry for entry in self.options.entries if self._looks(entry)), None)
        if looked_at is not None:
            self._refer(looked_at)
        for entry in self.options.entries:
            lengths = self.missing(entry)
            if not lengths:
                say(f"{entry.label}: nothing to measure{self._why_not(entry)}")
                continue
            if self._looks(entry):
                self._refer(entry)
            if not self._in_time():
                break
            self._walk(entry, lengths)
            while self.options.settings.rehearse and self._in_time() and (lengths := self.missing(entry)):
                self._walk(entry, lengths)
            if entry.budget_from is not None and (left := self.missing(entry)) and left != lengths:
                # Its process was killed for want of memory at one length, which is not the end of the others.
                self._walk(entry, left)
        unfinished = [entry.label for entry in self.options.entries if self.missing(entry)]
        if unfinished:
            say(f"not all done in {self.options.minutes} minutes: {', '.join(unfinished)}; the same command goes on")
            return NOT_IN_TIME
        return FAILED if any(row["status"] == "error" for row in self.file.rows) else DONE

    def _looks(self, entry: Entry) -> bool:
        """Whether gradients of ``entry`` will be looked at."""
        return self._sketch_at(entry) in self.missing(entry)

    def _refer(self, entry: Entry) -> None:
        """Measure what the gradients of ``entry``, which comes next, are compared with, where that is not there.

        A wider dtype's, before all others. Where there is none: unwrapped's own, or where that comes later, or failed,
        those of one step of the same.
        """
        tokens, wanted = self.options.lengths[0], self.options.reference
        if self.file.find(REFERENCE, tokens) is not None or not self._in_time():
            return
        wider = wanted and self.options.settings.dtype in WIDER and not self.tried_wider
        named = any(one.label == PLAIN for one in self.options.entries)
        plain = (wanted or named) and entry.label != PLAIN and self._base(tokens) is None
        if not wider and not plain:
            return
        self.tried_wider = True
        self._walk(Entry(REFERENCE), (tokens,), wider=wider, plain=plain)

    def _base(self, tokens: int) -> tuple[str, Row] | None:
        """(whose, row) that gradients at ``tokens`` are compared with, if it is there."""
        found = self.file.find(REFERENCE, tokens)
        if found is not None and found["status"] == "ok":
            own = self.options.settings.dtype
            dtype = (found["details"] or {}).get("dtype", WIDER.get(own))
            return PLAIN if dtype == own else dtype, found
        found = self.file.find(PLAIN, tokens)
        return None if found is None or found["status"] != "ok" or found["gradient_sketch"] is None else (PLAIN, found)

    def _in_time(self) -> bool:
        return self.deadline is None or time.time() < self.deadline

    def _traces(self, entry: Entry) -> str | None:
        folder = self.options.traces
        return None if folder is None else str(folder / f"{self.options.run}-{entry.label.replace('@', '-at-')}")

    def _walk(self, entry: Entry, lengths: tuple[int, ...], *, wider: bool = False, plain: bool = False) -> None:
        say(f"{entry.label}: {', '.join(f'{tokens:,}' for tokens in lengths)} tokens")
        budgets = self.budgets(entry, lengths)
        job = Job(
            contender=entry.name,
            settings=self.options.settings,
            lengths=lengths,
            budgets=budgets,
            own_budgets=entry.budget_from is not None,
            host_budget=self.options.host_budget if entry.takes_budget else None,
            sketch_at=self._sketch_at(entry),
            longest=self.options.lengths[-1],
            wider=wider,
            plain=plain,
            deadline=self.deadline,
            traces=self._traces(entry),
        )
        child = Child(job)
        with closing(iter(child)) as measurements:  # its process ends before anything else is done
            for measured in measurements:
                if "refused" in measured:
                    raise RefusedError(measured["refused"])
                self._append(entry, measured, budgets)
                if measured["status"] != "ok" and not (job.own_budgets and measured["status"] == "oom"):
                    return
        failure = child.failure()
        if failure is not None:
            left = next((tokens for tokens in lengths if self.file.find(entry.label, tokens) is None), None)
            if left is None:  # all was measured: it ended badly, which is nobody's result
                say(f"{entry.label}: {failure['error']}, when all was done")
                return
            failure |= {"seq_len": left, "rehearsed": self.options.settings.rehearse}
            self._append(entry, failure, budgets)

    def _sketch_at(self, entry: Entry) -> int | None:
        """Where gradients are looked at: the shortest length, in runs that go through all of them.

        Not where what comes before the measured step is a rehearsal: for a look it would be a step of minutes.
        """
        first = self.options.lengths[0]
        alone = entry.name == "kernels" or self.options.settings.rehearse or self.options.longest
        return None if alone or warms_up_by_rehearsal(first) else first

    def _append(self, entry: Entry, measured: Row, budgets: dict[int, int]) -> None:
        self._compare(entry, measured)
        row = make_row(
            {
                **measured,
                **self.conditions,
                "run": self.options.run,
                "contender": entry.label,
                "budget": budgets.get(measured["seq_len"]),
                "budget_from": entry.budget_from,
                "host_budget": self.options.host_budget if entry.takes_budget else None,
                "date": provenance.now(),
            }
        )
        if apart := forecast.off(row):
            row["details"]["forecast"]["off"] = apart
        self.file.append(row)
        found = first_line(row["error"] or "")
        if row["status"] == "ok":
            seconds = row["step_seconds"] or row["first_step_seconds"]
            found = "rehearsed" if row["rehearsed"] else f"{seconds:.4g} s"
        say(f"  {row['seq_len']:>9,}  {row['status']}  {found}")

    def _compare(self, entry: Entry, measured: Row) -> None:
        """How far gradients are from the reference's; too far is an error, however fast."""
        mine = measured.get("gradient_sketch")
        if mine is None or entry.name == REFERENCE:
            return
        base = self._base(measured["seq_len"])
        if base is None and entry.label == PLAIN and measured["status"] == "ok":
            base = PLAIN, measured
        if base is None:
            say(f"{entry.label}: its gradients are compared with nobody's, for want of a reference and of {PLAIN}")
            return
        name, reference = base
        apart, most = relative_difference(mine, reference["gradient_sketch"]), self._most(entry, reference)
        measured["gradient_difference"] = apart
        measured["details"] = {**(measured.get("details") or {}), "gradient_reference": name}
        if not apart <= most:  # NaN is not
            measured["status"] = "error"
            measured["error"] = f"gradients are {apart:.2g} (relative L2) from {name}'s; at most {most:.2g} is rounding"

    def _most(self, entry: Entry, reference: Row) -> float:
        """How far gradients of ``entry`` may be from those of ``reference``."""
        tolerance = TOLERANCE[self.options.settings.dtype]
        if entry.label == PLAIN:  # its rounding alone, which is that of the model
            return _MOST * tolerance
        rounding = (reference["details"] or {}).get("rounding") or 0.0
        # As far off as unwrapped may not be, plain PyTorch says nothing of rounding.
        return min(max(tolerance, 2 * rounding), _MOST * tolerance) if rounding <= _MOST * tolerance else tolerance


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the run's table; an exit code."""
    try:
        with terminable():
            return _measure(parse_options(arguments))
    except (RowError, RefusedError) as error:
        say(f"error: {error}")
        return USAGE
    except KeyboardInterrupt:
        say("interrupted: the same command goes on where it stopped")
        return INTERRUPTED


def _measure(options: Options) -> int:
    with held(options.out):
        runner = Runner.of(options)
        try:
            return runner.run()
        finally:
            # What the file holds: an interrupt may come when a row is written and not yet known here.
            print(run_table([row for row in read_rows(options.out)[0] if row["run"] == options.run]), flush=True)
