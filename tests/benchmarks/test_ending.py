"""How a contender's process ended: for want of memory or of its own, with its last words."""

import signal
import subprocess
from types import SimpleNamespace

import pytest

from benchmarks.harness import host_guard
from benchmarks.harness.ending import LastWords, failure
from benchmarks.harness.runner import Child
from tests.short_memory import little_memory

NO_BYTES = "terminate called after throwing an instance of 'std::bad_alloc'"
NO_THREAD = "libgomp: Thread creation failed: Resource temporarily unavailable"


@pytest.mark.parametrize(
    ("returned", "said", "capped", "status", "cause"),
    [
        (-signal.SIGKILL, "", False, "oom", "as processes are when host memory runs out"),
        (-signal.SIGABRT, NO_BYTES, False, "oom", "for want of memory"),
        (1, NO_THREAD, True, "oom", "for want of memory for the stack of a thread"),
        # Nobody limited its memory: there were too many threads.
        (1, NO_THREAD, False, "error", "of its own"),
        (-signal.SIGSEGV, "", True, "error", "signal 11, of its own"),
        (3, "AssertionError: no", True, "error", "exit code 3, of its own; it said: AssertionError: no"),
    ],
)  # fmt: skip
def test_what_last_words_say(returned, said, capped, status, cause):
    row = failure(returned, tuple(said.splitlines()), capped=capped)
    assert row["status"] == status
    assert cause in row["error"]
    assert said in row["error"]


KILLS = "nr_free_pages 5\noom_kill {}\noom_kill_other 7\n"


@pytest.mark.parametrize(
    "case",  # available of 100 bytes, what the kernel counts before and after, status
    [
        (50, KILLS.format(2), KILLS.format(2), "error"),
        (50, KILLS.format(2), KILLS.format(3), "oom"),
        (10, KILLS.format(2), KILLS.format(2), "oom"),
        (50, "", "", "oom"),
        (50, None, None, "oom"),
    ],
)  # fmt: skip
def test_who_was_killed_from_outside(make_job, tmp_path, monkeypatch, case):
    available, before, after, status = case
    counts, then, made = tmp_path / "vmstat", tmp_path / "then", subprocess.Popen
    # It reads its job first, so that who watches it is there.
    command = ["sh", "-c", f"cat > /dev/null; test -e {then} && cp {then} {counts}; kill -9 $$"]
    for path, text in ((counts, before), (then, after)):
        if text is not None:
            path.write_text(text)
    monkeypatch.setattr(host_guard, "_COUNTS", counts)
    monkeypatch.setattr(host_guard.psutil, "virtual_memory", lambda: SimpleNamespace(total=100, available=available))
    monkeypatch.setattr(subprocess, "Popen", lambda _, **given: made(command, **given))
    child = Child(make_job("unwrapped"))
    assert list(child) == []
    row = child.failure()
    assert row["status"] == status
    assert ("from outside" in row["error"]) == (status == "error")


def test_limits_of_this_process_are_those_of_a_contender_too():
    with little_memory(64 << 20):
        assert failure(1, (NO_THREAD,), capped=False)["status"] == "oom"


def test_talk_is_passed_on_and_its_end_is_kept(capfd):
    process = subprocess.Popen(
        ["sh", "-c", "for i in $(seq 30); do echo line $i >&2; done; echo >&2"], stderr=subprocess.PIPE, text=True
    )
    said = LastWords(process).wait(20)
    assert process.wait() == 0
    assert said == tuple(f"line {i}" for i in range(11, 31))
    assert capfd.readouterr().err.startswith("line 1\nline 2\n")
