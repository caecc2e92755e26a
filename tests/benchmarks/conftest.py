"""Small jobs, and contenders that run in the test's own process."""

import io
import json
from typing import ClassVar

import pytest
from torch import distributed

from benchmarks.harness import runner
from benchmarks.harness.geometry import Scope
from benchmarks.harness.job import Job, Settings
from benchmarks.harness.options import parse_options
from benchmarks.harness.worker import walk
from tests.sharing import shared_work
from tests.tiny import few_samples

__all__ = ["few_samples", "shared_work"]


@pytest.fixture
def make_job():
    """A job, on the tiny geometry unless told otherwise."""

    def make(contender, lengths=(64,), *, blocks=2, scope=Scope.BLOCKS, dtype="float32", attention="auto", **job):
        settings = Settings(
            geometry=job.pop("geometry", "tiny"),
            scope=scope,
            blocks=blocks,
            device="cpu",
            dtype=dtype,
            attention=attention,
            steps=1,
        )
        return Job(contender=contender, settings=settings, lengths=tuple(lengths), **job)

    return make


@pytest.fixture(autouse=True)
def no_group_left():
    """A contender of Megatron's makes a process group, for a process that is its own."""
    yield
    if distributed.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()


class InProcess:
    """Stands in for a contender's process: the same worker, without starting Python and importing torch again."""

    started: ClassVar[list[Job]] = []

    def __init__(self, job):
        self.job = job
        self.overdue = False
        self.returned = 0
        InProcess.started.append(job)

    def __iter__(self):
        out = io.StringIO()
        walk(Job.from_json(self.job.to_json()), out)
        yield from (json.loads(line) for line in out.getvalue().splitlines())

    def failure(self):
        """Its process does not end badly, it has none."""
        return None


@pytest.fixture
def in_process(monkeypatch):
    """Contenders run in the test's process; the jobs that were started."""
    InProcess.started = []
    monkeypatch.setattr(runner, "Child", InProcess)
    return InProcess.started


@pytest.fixture
def arguments(tmp_path):
    """The command line of a small run, with what a test adds."""

    def make(contenders, *more, lengths="48,96"):
        return [
            "--run", "test", "--out", str(tmp_path / "rows.jsonl"), "--commit", "abc", "--device", "cpu",
            "--geometry", "tiny", "--blocks", "2", "--lengths", lengths, "--steps", "2", "--contenders", contenders,
            *more,
        ]  # fmt: skip

    return make


@pytest.fixture
def make_runner(arguments):
    """A run as the command line makes it."""
    return lambda *given, **named: runner.Runner.of(parse_options(arguments(*given, **named)))
