"""A run: order, resumption, failures and what ends up in the file."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.harness import runner
from benchmarks.harness.contenders import CONTENDERS
from benchmarks.harness.job import Job
from benchmarks.harness.options import parse_options
from benchmarks.harness.own_files import RefusedError
from benchmarks.harness.rows import RowFile, held, read_rows
from benchmarks.harness.runner import Child, Runner, main
from benchmarks.harness.tables import tables
from tests.benchmarks.wrong import WrongGradients
from tests.house.sources import ROOT

SMOKE = "kernels,unwrapped,selective,memo-auto,checkpoint,save_on_cpu"


def rows_of(arguments):
    """What the run's file holds."""
    path = arguments[arguments.index("--out") + 1]
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_a_small_run_of_everything(in_process, arguments, capsys):
    given = arguments(SMOKE, "--budget-from", "selective", lengths="128,256")
    assert main(given) == 0
    rows = rows_of(given)
    done = [(row["contender"], row["seq_len"]) for row in rows if row["status"] == "ok"]
    assert done[0] == ("reference", 128)
    assert done[1:] == [
        (name, tokens)
        for name in (
            "kernels",
            "unwrapped",
            "selective",
            "memo-auto@selective",
            "memo-auto",
            "checkpoint",
            "save_on_cpu",
        )
        for tokens in (128, 256)
    ]
    peaks = {row["seq_len"]: row["peak_allocated"] for row in rows if row["contender"] == "selective"}
    budgets = {row["seq_len"]: row["budget"] for row in rows if row["contender"] == "memo-auto@selective"}
    assert budgets == peaks
    compared = [row for row in rows[1:] if row["seq_len"] == 128 and row["contender"] != "kernels"]
    assert len(compared) == 6
    assert all(0 < row["gradient_difference"] < 1e-4 for row in compared)
    assert all(row["details"]["gradient_reference"] == "float64" for row in compared)
    forecasts = [row["details"]["forecast"]["off"] for row in rows if row["contender"] == "memo-auto"]
    assert [set(one) for one in forecasts] == [{"step", "peak", "host"}] * 2
    for name in ("commit", "date", "versions", "cpu", "config", "run", "first_step_seconds"):
        assert all(row[name] for row in rows)
    table = capsys.readouterr().out
    assert "128 tokens" in table
    assert "memo-auto@selective" in table


def test_nothing_is_lost_or_repeated_when_a_run_goes_on(in_process, arguments, make_runner):
    assert main(arguments("unwrapped", lengths="48")) == 0
    assert main(arguments("unwrapped,checkpoint")) == 0
    assert main(arguments("unwrapped,checkpoint")) == 0
    assert [(job.contender, job.lengths) for job in in_process] == [
        ("reference", (48,)),
        ("unwrapped", (48,)),
        ("unwrapped", (96,)),
        ("checkpoint", (48, 96)),
    ]
    runner_ = make_runner("unwrapped,checkpoint")
    assert [(row["contender"], row["seq_len"]) for row in runner_.file.rows] == [
        ("reference", 48),
        ("unwrapped", 48),
        ("unwrapped", 96),
        ("checkpoint", 48),
        ("checkpoint", 96),
    ]
    # The sketch of an earlier process is what a later one is compared with.
    assert runner_.file.find("checkpoint", 48)["gradient_difference"] < 1e-4


@pytest.fixture
def scripted(monkeypatch):
    """Children that yield given measurements and end as told."""

    def script(measurements, failure=None):
        class Scripted:
            def __init__(self, job):
                self.job = job

            def __iter__(self):
                known = [m for m in measurements if m["seq_len"] in self.job.lengths]
                yield from (dict(m) for m in known if not self.refers())

            def failure(self):
                return None if self.refers() else failure

            def refers(self):
                """The reference is none of the contenders that are scripted."""
                return self.job.contender == "reference"

        monkeypatch.setattr(runner, "Child", Scripted)

    return script


def ok(tokens, **more):
    timing = {"step_seconds": 1.0, "p20": 1.0, "p80": 1.0, "n": 1, "seconds": [1.0]}
    return {"status": "ok", "seq_len": tokens, "peak_allocated": 1000 * tokens, **timing, **more}


def test_out_of_memory_is_not_tried_again_and_nothing_longer_either(scripted, make_runner):
    scripted([ok(48), {"status": "oom", "seq_len": 96, "error": "CUDA out of memory"}])
    assert make_runner("unwrapped", lengths="48,96,192").run() == 0
    scripted([ok(192)])
    again = make_runner("unwrapped", lengths="48,96,192")
    assert again.run() == 0
    assert [(row["seq_len"], row["status"]) for row in again.file.rows] == [(48, "ok"), (96, "oom")]


def test_what_lies_below_a_length_that_did_not_fit_is_measured_later(scripted, make_runner, capsys):
    scripted([{"status": "oom", "seq_len": 192, "error": "CUDA out of memory"}])
    make_runner("unwrapped", lengths="192").run()
    scripted([ok(48), ok(96), ok(384)])
    again = make_runner("unwrapped", lengths="48,96,192,384")
    assert again.run() == 0
    assert sorted((row["seq_len"], row["status"]) for row in again.file.rows) == [(48, "ok"), (96, "ok"), (192, "oom")]
    capsys.readouterr()
    assert again.run() == 0
    assert "unwrapped: nothing to measure beyond 192 tokens, which is oom: see its row" in capsys.readouterr().err


def test_what_was_skipped_is_skipped_at_every_length(scripted, make_runner, capsys):
    scripted([{"status": "skipped", "seq_len": 96, "error": "not installed"}])
    make_runner("unwrapped", lengths="96").run()
    scripted([ok(48)])
    again = make_runner("unwrapped", lengths="48,96")
    again.run()
    assert [(row["seq_len"], row["status"]) for row in again.file.rows] == [(96, "skipped")]
    assert "nothing to measure beyond 96 tokens, which is skipped" in capsys.readouterr().err


def test_an_import_of_the_project_s_own_that_fails_is_nobody_s_result(in_process, arguments, monkeypatch, capsys):
    """As where the tree is replaced while a run goes on."""

    def fail(job):
        raise ModuleNotFoundError("No module named 'benchmarks.harness.gone'", name="benchmarks.harness.gone")

    monkeypatch.setitem(CONTENDERS, "checkpoint", fail)
    given = arguments("unwrapped,checkpoint,selective", "--reference", "unwrapped", lengths="48")
    assert main(given) == 2
    said = "could not be imported (No module named 'benchmarks.harness.gone')"
    assert f"error: a file of the project itself {said}" in capsys.readouterr().err
    assert [row["contender"] for row in rows_of(given)] == ["unwrapped"]
    monkeypatch.setitem(CONTENDERS, "checkpoint", CONTENDERS["selective"])
    assert main(given) == 0

    def foreign(job):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setitem(CONTENDERS, "save_on_cpu", foreign)
    assert main(arguments("save_on_cpu", "--reference", "unwrapped", lengths="48")) == 1


@pytest.mark.parametrize("missing", ["benchmarks.harness.worker", "benchmarks.harness.bound"])
def test_a_process_that_does_not_find_the_project_is_nobody_s_result(make_job, monkeypatch, missing):
    job = make_job("unwrapped")
    words = (f"ModuleNotFoundError: No module named '{missing}'",)
    child = Child(job, returned=1, said=words)
    with pytest.raises(RefusedError, match="could not be imported"):
        child.failure()
    words = ("ModuleNotFoundError: No module named 'triton'",)
    assert Child(job, returned=1, said=words).failure()["status"] == "error"


def test_a_row_whose_line_was_deleted_is_measured_again(scripted, arguments):
    given = arguments("unwrapped,checkpoint")
    scripted([ok(48), {"status": "error", "seq_len": 96, "error": "no"}])
    assert main(given) == 1
    scripted([ok(48), ok(96)])
    assert main(given) == 1
    path = Path(given[given.index("--out") + 1])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["status"] == "ok"))
    assert main(given) == 0
    done = [(row["contender"], row["seq_len"], row["status"]) for row in rows_of(given)]
    assert done == [
        ("unwrapped", 48, "ok"), ("checkpoint", 48, "ok"), ("unwrapped", 96, "ok"), ("checkpoint", 96, "ok"),
    ]  # fmt: skip


def test_a_budget_from_another_is_there_where_that_one_ran(scripted, make_runner):
    scripted([ok(48), {"status": "oom", "seq_len": 96, "error": "CUDA out of memory"}])
    found = make_runner("selective,memo-auto@selective")
    found.run()
    (entry,) = [one for one in found.options.entries if one.budget_from]
    assert found.budgets(entry) == {48: 48_000}
    assert found.missing(entry) == ()
    assert found.file.find("memo-auto@selective", 48)["budget"] == 48_000
    assert found.file.find("memo-auto@selective", 96) is None


def test_a_budget_in_a_name_is_that_of_every_length(scripted, make_runner):
    scripted([ok(48), ok(96)])
    found = make_runner("memo-auto@2MiB,memo-auto")
    found.run()
    assert [row["budget"] for row in found.file.of("memo-auto@2MiB")] == [2 << 20, 2 << 20]
    assert [row["budget"] for row in found.file.of("memo-auto")] == [None, None]


def test_a_budget_from_another_that_is_too_small_is_not_the_end(scripted, make_runner):
    scripted([ok(48), ok(96)])
    make_runner("selective").run()
    scripted([{"status": "oom", "seq_len": 48, "error": "PlanInfeasibleError: this step does not fit"}, ok(96)])
    found = make_runner("selective,memo-auto@selective")
    assert found.run() == 0
    rows = [(row["seq_len"], row["status"]) for row in found.file.of("memo-auto@selective")]
    assert rows == [(48, "oom"), (96, "ok")]


def test_a_process_killed_at_one_budget_goes_on_with_the_next(scripted, make_runner):
    scripted([ok(48), ok(96)])
    make_runner("selective").run()
    jobs = scripted([], {"status": "oom", "error": "killed by signal 9"})
    found = make_runner("selective,memo-auto@selective")
    assert found.run() == 0
    rows = [(row["seq_len"], row["status"]) for row in found.file.of("memo-auto@selective")]
    assert rows == [(48, "oom"), (96, "oom")]
    assert jobs is None or all(job.own_budgets for job in jobs)


def test_a_process_that_ends_badly_is_a_row(scripted, make_runner):
    scripted([ok(48)], {"status": "error", "error": "the process ended with signal 11"})
    found = make_runner("unwrapped")
    assert found.run() == 1
    assert [(row["seq_len"], row["status"]) for row in found.file.rows] == [(48, "ok"), (96, "error")]


def test_wrong_gradients_are_an_error_however_fast(in_process, arguments, monkeypatch):
    monkeypatch.setitem(CONTENDERS, "checkpoint", WrongGradients)
    given = arguments("unwrapped,checkpoint")
    assert main(given) == 1
    (row,) = [row for row in rows_of(given) if row["contender"] == "checkpoint"]
    assert row["status"] == "error"
    assert "gradients are" in row["error"]
    assert row["gradient_difference"] > 1e-4


def test_adapters_alone_are_trained_where_a_rank_is_given(in_process, arguments, capsys):
    given = arguments("unwrapped,memo-replay", "--scope", "step", "--lora", "4", lengths="96")
    assert main(given) == 0
    rows = rows_of(given)[1:]
    assert [row["config"]["lora"] for row in rows] == [4] * 2
    assert all(0 < row["gradient_difference"] < 1e-4 for row in rows)
    assert "LoRA of rank 4" in capsys.readouterr().out


def test_a_run_does_not_go_on_with_other_settings(in_process, arguments, capsys):
    assert main(arguments("unwrapped", lengths="48")) == 0
    assert main(arguments("unwrapped", "--seed", "1", lengths="48")) == 2
    assert "was measured with config = " in capsys.readouterr().err


def test_what_the_allocator_is_told_is_a_condition_of_a_run(in_process, arguments, monkeypatch, capsys):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    given = arguments("unwrapped", "--reference", "unwrapped", lengths="48")
    assert main(given) == 0
    (row,) = rows_of(given)
    assert row["config"]["allocator"] == "expandable_segments:True"
    assert "auto attention, torch" in (told := capsys.readouterr().out)
    assert "allocator expandable_segments:True" in told
    assert "allocator expandable_segments:True" in tables([given[given.index("--out") + 1]])
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    assert main(given) == 2
    assert "was measured with config = " in capsys.readouterr().err


def test_two_runs_do_not_write_to_one_file(in_process, arguments, tmp_path, capsys):
    given = arguments("unwrapped", "--reference", "unwrapped", lengths="48")
    with held(tmp_path / "rows.jsonl"):
        assert main(given) == 2
        assert "another run is writing to" in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()
    assert main(given) == 0
    assert len(rows_of(given)) == 1


def test_bad_input_is_refused_before_anything_runs(arguments, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for more, message in (
        (["--contenders", "nonsense"], "contender 'nonsense' is unknown"),
        (["--steps", "0"], "at least one step"),
        (["--blocks", "0"], "--blocks 0: at least one block is measured"),
        (["--blocks", "-1"], "--blocks -1: at least one block is measured"),
        (["--scope", "step", "--lengths", "1,48"], "--lengths 1: in scope step tokens predict the next one"),
        (["--budget-from", "nope"], "--budget-from nope is unknown; there are: kernels, unwrapped"),
        (["--budget-from", "selective"], "--budget-from selective: nobody takes it; name one of memo's"),
        (["--budget", "0"], "argument --budget: '0' leaves no memory: give a size such as 24GiB"),
        (["--memory", "0GiB"], "argument --memory: '0GiB' leaves no memory"),
        (["--host-memory", "0"], "argument --host-memory: '0' leaves no memory"),
        (["--contenders", "memo-auto@0"], "'memo-auto@0': a budget of 0 bytes leaves no memory"),
        (["--minutes", "nan"], "argument --minutes: 'nan' is no time"),
        (["--minutes", "-1"], "argument --minutes: '-1' is no time"),
        (["--minutes", "inf"], "argument --minutes: 'inf' is no time"),
        (["--minutes", "soon"], "argument --minutes: 'soon' is no time"),
        (["--run", " "], "--run ' ' is no name of a run"),
        (["--run", "a\nb"], "--run 'a\\nb' is no name of a run"),
        (["--seed", str(2**63)], "PyTorch takes none; give a number from 0 to"),
        (["--seed", "-1"], "--seed -1: PyTorch takes none"),
        (["--attention", "cudnn"], "PyTorch has none on cpu in float32; there are: auto, flash, math"),
        (["--attention", "efficient"], "PyTorch has none on cpu in float32; there are: auto, flash, math"),
        (["--traces", "README.md"], "README.md is no folder; give one"),
        (["--traces", "README.md/below"], "README.md is no folder; give one"),
        (["--geometry", ""], "--geometry '' names no config.json; there are: tiny, qwen3-tiny, llama-1b-d128,"),
        (["--geometry", "a" * 300], "a is unknown; there are: tiny, qwen3-tiny,"),
        (["--geometry", "docs"], "--geometry 'docs' names no config.json; there are: tiny, qwen3-tiny,"),
        (["--lora", "0"], "--lora 0: a rank is 1 or more"),
        (["--lora", "8", "--contenders", "unwrapped,kernels"], "kernels has no layers that adapters could be beside"),
        (["--lengths", "many"], "argument --lengths: 'many' is not a token count"),
        (["--budget", "24GiBi"], "argument --budget: '24GiBi' is not a size"),
        (["--geometry", "nonsense"], "--geometry nonsense is unknown; there are: tiny, qwen3-tiny, llama-1b-d128,"),
        (["--geometry", "README.md"], "README.md is not a config.json"),
        (["--geometry", "gpt-7b-tp8", "--scope", "step"], "tensor-parallel ranks of MEMO's GPT 7B"),
        (["--device", "tpu"], "invalid choice: 'tpu' (choose from"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*arguments("unwrapped"), *more])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_adapters_without_peft_are_refused_before_anything_runs(arguments, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(SystemExit):
        main(arguments("unwrapped", "--lora", "4"))
    assert "--lora 4: adapters are PEFT's, which is not installed: pip install peft" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "nonsense"}, "no config of type 'nonsense' can be made from it: "),
        ({"model_type": "mamba", "num_hidden_layers": 2}, "a config of type 'mamba' has no num_attention_heads"),
    ],
)
@pytest.mark.usefixtures("in_process")
def test_a_config_of_no_blocks_is_refused_without_a_row(arguments, tmp_path, capsys, config, said):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for contenders in ("unwrapped", "kernels"):
        assert main(arguments(contenders, "--geometry", str(tmp_path / "config.json"))) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ")
        assert said in last
        assert len(last) < 400
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_file_that_cannot_be_one_of_rows_is_refused_before_anything_runs(in_process, arguments, tmp_path, capsys):
    (tmp_path / "file").write_text('{"precious":1}')
    for name, said in ((".", "it is a folder"), ("file/rows", "Not a directory"), ("file", "no schema version")):
        assert main([*arguments("unwrapped"), "--out", str(tmp_path / name)]) == 2
        assert said in (told := capsys.readouterr().err)
        assert told.startswith("error: ")
    assert in_process == []
    assert (tmp_path / "file").read_text() == '{"precious":1}'


def test_what_is_left_when_the_time_is_over_is_said_and_done_by_the_next_run(scripted, arguments, capsys):
    given = arguments("unwrapped,checkpoint", "--minutes", "1")
    scripted([ok(48)])  # a worker that did not begin the longer length
    assert main(given) == 4
    assert "not all done in 1.0 minutes: unwrapped, checkpoint; the same command goes on" in capsys.readouterr().err
    assert main(arguments("unwrapped,checkpoint", "--minutes", "0")) == 4
    scripted([ok(48), ok(96)])
    assert main(given) == 0
    assert [(row["contender"], row["seq_len"]) for row in rows_of(given)] == [
        ("unwrapped", 48),
        ("checkpoint", 48),
        ("unwrapped", 96),
        ("checkpoint", 96),
    ]


def slow_job(make_job, **more):
    """A job that takes far longer than the test waits."""
    return make_job("unwrapped", (64, 65_536), **more)


def test_the_deadline_kills_what_still_runs(make_job):
    child = Child(slow_job(make_job, deadline=time.time() + 0.5))
    started = time.perf_counter()
    assert [row["seq_len"] for row in child] in ([], [64])
    assert time.perf_counter() - started < 10
    assert child.overdue
    assert child.failure() is None


def test_a_contender_that_takes_too_much_of_the_host_is_ended_and_out_of_memory(make_job):
    job = slow_job(make_job)
    # Far below what is in use on any machine.
    child = Child(replace(job, settings=replace(job.settings, host_memory=2**20)))
    started = time.perf_counter()
    assert [row["seq_len"] for row in child] == []
    assert time.perf_counter() - started < 10
    failure = child.failure()
    assert failure["status"] == "oom"
    assert failure["error"].endswith("GiB of host memory were in use, and --host-memory leaves 0.0 GiB")


def test_a_process_that_ends_badly_when_all_was_measured_is_no_row(scripted, arguments, capsys):
    scripted([ok(48), ok(96)], {"status": "error", "error": "the process ended with signal 11, of its own"})
    given = arguments("unwrapped,checkpoint")
    assert main(given) == 0
    assert [row["status"] for row in rows_of(given)] == ["ok"] * 4
    assert "checkpoint: the process ended with signal 11, of its own, when all was done" in capsys.readouterr().err


@pytest.mark.parametrize(("returned", "status"), [(-signal.SIGKILL, "oom"), (3, "error"), (0, None)])
def test_how_a_process_ended(make_job, returned, status):
    child = Child(make_job("unwrapped"))
    child.returned = returned
    failure = child.failure()
    assert (failure and failure["status"]) == status


@pytest.mark.slow
def test_a_run_in_processes_survives_an_interrupt(arguments, tmp_path):
    """Real processes, a real memory limit, and an interrupt in the middle."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "solver")])
    given = arguments("checkpoint", "--memory", "100MiB", "--reference", "unwrapped", lengths="64,12K")
    command = [sys.executable, "-m", "benchmarks.harness", *given]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out = tmp_path / "rows.jsonl"
    while first.poll() is None and not read_rows(out)[0]:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    printed, _ = first.communicate(timeout=60)
    assert "64 tokens" in printed
    assert first.returncode == 130
    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    rows, _ = read_rows(out)
    assert [(row["contender"], row["seq_len"], row["status"]) for row in rows] == [
        ("checkpoint", 64, "ok"),
        ("checkpoint", 12288, "oom"),
    ]
    assert "can't allocate memory" in rows[1]["error"]
    assert "checkpoint at 12,288: oom" in second.stdout


@pytest.mark.parametrize(("lengths", "looked_at"), [("64K,256K", 2**16), ("256K", None), ("1M", None)])
def test_no_step_of_minutes_is_run_to_look_at_gradients(lengths, looked_at, tmp_path):
    """Beyond 131,072 tokens warming up is a rehearsal, whose gradients are none."""
    arguments = ["--geometry", "tiny", "--contenders", "memo-tiled", "--lengths", lengths, "--device", "cpu"]
    options = parse_options([*arguments, "--out", str(tmp_path / "rows.jsonl")])
    run = Runner(options, RowFile(options.out, options.run), {})
    assert run._sketch_at(options.entries[0]) == looked_at


def test_jobs_survive_the_pipe(make_job):
    job = make_job("memo-auto", (64, 96), budgets={64: 1, 96: 2}, host_budget=3, sketch_at=64, deadline=1.5)
    assert Job.from_json(job.to_json()) == job
