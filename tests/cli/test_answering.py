"""An answer that cannot be printed, as a process of its own: Python's last act would be to print the rest of it."""

import os
import subprocess
import sys

import pytest

from tests.house.sources import ROOT

ROWS = ROOT / "benchmarks" / "results" / "harness_gpt_h200.jsonl"
VERBS = {
    "version": ["memo_runtime", "--version"],
    "solve": ["memo_runtime", "solve", "trace.csv"],
    "help": ["memo_runtime", "check", "--help"],
    "bench table": ["benchmarks.harness.tables", str(ROWS)],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "trace.csv").write_text("id,lower,upper,size\na,0,4,3\n")
    return tmp_path


def run(folder, verb, stdout, *, buffered):
    # Python holds output back where the shell has not said otherwise, and then fails later.
    without = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment = without if buffered else without | {"PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "solver")])
    command = [sys.executable, "-m", *VERBS[verb]]
    return subprocess.run(
        command, cwd=folder, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize(("verb", "buffered"), [
    ("version", True), ("solve", True), ("solve", False), ("help", True), ("bench table", True),
])  # fmt: skip
def test_a_full_disk_below_stdout_is_said(folder, verb, buffered):
    with open("/dev/full", "w") as full:
        done = run(folder, verb, full, buffered=buffered)
    assert done.returncode == 2
    assert done.stderr.partition(": ")[2] == "the answer cannot be printed: No space left on device\n"


@pytest.mark.parametrize(("verb", "buffered"), [("solve", True), ("solve", False), ("help", True)])
def test_a_reader_that_has_gone_changes_nothing(folder, verb, buffered):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run(folder, verb, writer, buffered=buffered)
    finally:
        os.close(writer)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("verb", ["--version", "bench --help"])
def test_without_a_stdout_nothing_is_printed(verb):
    done = subprocess.run(
        ["sh", "-c", f'exec "{sys.executable}" -m memo_runtime {verb} >&-'], cwd=ROOT,
        stderr=subprocess.PIPE, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
