"""A contender's process and its runner: neither outlives the other."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.harness import runner
from benchmarks.harness.bound import held_back
from benchmarks.harness.runner import Child, main
from tests.house.sources import ROOT


def start(*command):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "solver")])}
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell's background jobs ignore it, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells a process that its parent has ended")
@pytest.mark.parametrize(
    ("end", "code"),
    [
        (lambda pid: os.kill(pid, signal.SIGKILL), -signal.SIGKILL),
        (lambda pid: os.kill(pid, signal.SIGTERM), 130),
        (lambda pid: os.killpg(pid, signal.SIGINT), 130),
    ],
    ids=["kill", "term", "ctrl-c"],
)
def test_a_contender_ends_with_its_runner(arguments, tmp_path, end, code):
    # Minutes of work, were it left alone.
    run = start("benchmarks.harness", *arguments("unwrapped", "--reference", "unwrapped", lengths="64K"))
    while not (started := [one for one in psutil.Process(run.pid).children() if "python" in one.name()]):
        assert run.poll() is None
        time.sleep(0.02)
    try:
        end(run.pid)
        _, said = run.communicate(timeout=60)
        assert psutil.wait_procs(started, timeout=20)[1] == []
    finally:
        run.kill()
    assert run.returncode == code
    assert "Traceback" not in said
    if code == 130:
        assert said.splitlines()[-1] == "interrupted: the same command goes on where it stopped"
        assert not (tmp_path / "rows.jsonl").exists()


def test_a_contender_does_not_begin_where_its_runner_has_ended():
    run = start("benchmarks.harness.bound", str(os.getpid() + 1))
    assert run.communicate(timeout=20) == ("", "")
    assert run.returncode == 1


def test_a_process_has_no_interrupts_before_it_can_handle_them():
    tell = "import signal; print(*sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with held_back():
        found = subprocess.run([sys.executable, "-c", tell], capture_output=True, text=True, check=True)
    assert {int(signal.SIGINT), int(signal.SIGTERM)} <= {int(one) for one in found.stdout.split()}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_an_interrupt_is_a_line_and_the_table_of_what_is_there(arguments, monkeypatch, capsys):
    class Interrupted:
        def __init__(self, job):
            pass

        def __iter__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            yield

    monkeypatch.setattr(runner, "Child", Interrupted)
    assert main(arguments("unwrapped")) == 130
    printed = capsys.readouterr()
    assert printed.out == "no rows\n"
    assert printed.err.endswith("\ninterrupted: the same command goes on where it stopped\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_row_that_its_process_did_not_finish_is_none(make_job, monkeypatch):
    command = ["sh", "-c", "printf '{\"seq_len\": 1}\\n{\"seq'; exit 3"]
    made = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **given: made(command, **given))
    child = Child(make_job("unwrapped"))
    assert list(child) == [{"seq_len": 1}]
    assert child.returned == 3
