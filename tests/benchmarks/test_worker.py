import io
import json
import os
import time

import pytest
import torch

from benchmarks.harness import worker
from benchmarks.harness.contenders import CONTENDERS
from benchmarks.harness.contenders.base import Contender
from benchmarks.harness.geometry import Scope
from benchmarks.harness.subject import Subject
from benchmarks.harness.worker import ran_out, walk
from memo_runtime.errors import HostLimitError, PlanInfeasibleError, PlanMismatchError


class Scripted(Contender):
    """Does what the test says at each length."""

    device = torch.device("cpu")

    def __init__(self, script):
        self.script = script
        self.finished = []

    def start(self, tokens):
        self.tokens = tokens

    def finish(self):
        self.finished.append(self.tokens)

    def step(self, on_gradients=None):
        action = self.script[self.tokens]
        if isinstance(action, BaseException):
            raise action
        time.sleep(action)

    def model_flops(self, tokens):
        return tokens


def measured(monkeypatch, job, script):
    monkeypatch.setitem(CONTENDERS, "unwrapped", lambda _: Scripted(script))
    out = io.StringIO()
    walk(job, out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
        OSError(12, "Cannot allocate memory (not enough memory)"),
        PlanInfeasibleError("this step does not fit in 3 MiB"),
        HostLimitError("more host memory than allowed"),
    ],
)
def test_running_out_of_memory_is_a_result_and_ends_the_walk(monkeypatch, make_job, error):
    rows = measured(monkeypatch, make_job("unwrapped", (8, 16, 32)), {8: 0.0, 16: error, 32: 0.0})
    assert [(row["seq_len"], row["status"]) for row in rows] == [(8, "ok"), (16, "oom")]
    assert type(error).__name__ in rows[1]["error"]


def test_a_budget_that_is_too_small_is_not_the_end_where_each_length_has_its_own(monkeypatch, make_job):
    steps = {8: PlanInfeasibleError("it does not fit in 3 MiB"), 16: 0.0, 32: torch.OutOfMemoryError("x"), 64: 0.0}
    job = make_job("unwrapped", tuple(steps), budgets={8: 1, 16: 2, 32: 3, 64: 4}, own_budgets=True)
    rows = measured(monkeypatch, job, steps)
    assert [(row["seq_len"], row["status"]) for row in rows] == [(8, "oom"), (16, "ok"), (32, "oom"), (64, "ok")]
    wrong = measured(monkeypatch, job, {**steps, 16: KeyError("x")})
    assert [(row["seq_len"], row["status"]) for row in wrong] == [(8, "oom"), (16, "error")]


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), PlanMismatchError("other model"), KeyError("x")]
)
def test_any_other_error_is_one(monkeypatch, make_job, error):
    rows = measured(monkeypatch, make_job("unwrapped", (8, 16)), {8: error, 16: 0.0})
    assert [(row["seq_len"], row["status"]) for row in rows] == [(8, "error")]
    assert not ran_out(error)


def test_a_contender_that_cannot_be_made_is_a_row(monkeypatch, make_job):
    def fail(job):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setitem(CONTENDERS, "unwrapped", fail)
    out = io.StringIO()
    walk(make_job("unwrapped", (8, 16)), out)
    assert [json.loads(line)["status"] for line in out.getvalue().splitlines()] == ["oom"]


def test_a_length_that_would_not_be_done_in_time_does_not_begin(monkeypatch, make_job):
    # 0.1 s a step at 8 tokens is 25.6 s at 128.
    job = make_job("unwrapped", (8, 128), deadline=time.time() + 5)
    rows = measured(monkeypatch, job, {8: 0.1, 128: 0.0})
    assert [row["seq_len"] for row in rows] == [8]


def test_a_measurement_says_what_was_measured(monkeypatch, make_job):
    job = make_job("unwrapped", (64,), sketch_at=64)
    out = io.StringIO()
    walk(job, out)
    (row,) = [json.loads(line) for line in out.getvalue().splitlines()]
    assert row["n"] == len(row["seconds"]) == 1
    assert row["p20"] <= row["step_seconds"] <= row["p80"]
    assert row["gradient_norm"] > 0
    assert row["peak_allocated"] > 0
    assert row["host_rss"] > 2**20
    assert row["recomputed_flops"] == 0


def test_long_steps_are_warmed_up_by_a_rehearsal(monkeypatch, make_job):
    replaced = []

    class Attends(Scripted):
        def step(self, on_gradients=None):
            query = torch.randn(1, 1, 96, 4)
            shown = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
            replaced.append(torch.equal(shown, query))  # a stand-in yields the values

    monkeypatch.setitem(CONTENDERS, "unwrapped", lambda _: Attends({}))
    out = io.StringIO()
    walk(make_job("unwrapped", (131_072, 131_073)), out)
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [row["warm_up"] for row in rows] == [1, 0]
    # The last step of each is the one whose peak is counted on the CPU.
    assert replaced == [False] * 3 + [True, False, False]


def test_the_peak_of_checkpointing_is_lower(make_job):
    peaks = {}
    for name in ("unwrapped", "checkpoint"):
        out = io.StringIO()
        walk(make_job(name, (256,), blocks=6), out)
        peaks[name] = json.loads(out.getvalue())["peak_allocated"]
    assert peaks["checkpoint"] < 0.7 * peaks["unwrapped"]


def test_what_libraries_print_is_no_measurement(monkeypatch, capfd):
    monkeypatch.setattr(worker, "walk", lambda job, out: (os.write(1, b"hello"), out.write("row\n")))
    monkeypatch.setattr("sys.stdin", io.StringIO('{"settings": {"scope": "blocks"}, "budgets": {}, "lengths": []}'))
    monkeypatch.setattr(worker.Job, "from_json", lambda text: None)
    kept = os.dup(1)
    try:
        worker.main()
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert capfd.readouterr() == ("row\n", "hello")


@pytest.mark.parametrize("scope", [Scope.STEP, pytest.param(Scope.BLOCKS, marks=pytest.mark.slow)])
def test_before_a_step_of_minutes_a_plan_runs_on_a_few_tiles(make_job, monkeypatch, scope):
    """Profile and plan are those of the whole, and so is the step that is measured."""
    seen, step = [], Subject.step

    def counted(self, batch, on_gradients=None):
        seen.append(batch[0].shape[1])
        step(self, batch, on_gradients)

    monkeypatch.setattr("benchmarks.harness.timing._REHEARSED_BEYOND", 512)
    monkeypatch.setattr("benchmarks.harness.contenders.memo._LONG", 0.0)
    monkeypatch.setattr("memo_runtime.rehearsal.first_step._TOKENS", 64)
    monkeypatch.setattr(Subject, "step", counted)
    out = io.StringIO()
    walk(make_job("memo-replay", (1031,), blocks=2, scope=scope), out)
    (row,) = (json.loads(line) for line in out.getvalue().splitlines())
    assert (row["status"], row["warm_up"], row["n"]) == ("ok", 0, 1), row.get("error")
    few = row["details"]["first_step_tokens"]
    assert 0 < few <= 1031 / 4
    # On the CPU one more step is for its peak.
    assert seen == [few, 1031, 1031]
    assert sum(row["details"]["executors"].values()) == 2
