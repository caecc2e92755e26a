import json
import os
import stat
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from memo_runtime.cli.app import app
from memo_solver import read_placement
from memo_solver.instances import random_requests
from memo_solver.writing import write_problem

CSV = "id,lower,upper,size\na,0,4,3\nb,2,6,3\nc,4,8,3\n"


def memo(*arguments):
    """`memo solve` in a process of its own."""
    command = [sys.executable, "-m", "memo_runtime", "solve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def memo_here(*arguments):
    """The same in this process, which is faster."""
    return CliRunner().invoke(app, ["solve", *map(str, arguments)])


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(CSV)
    return path


def test_a_placement_is_written_and_the_summary_is_printed(trace, tmp_path):
    done = memo(trace, "-o", tmp_path / "out.csv")
    assert done.returncode == 0, done.stderr
    assert "optimal: peak 6" in done.stdout
    assert read_placement(tmp_path / "out.csv").peak == 6


def test_json_holds_the_offsets_by_id(trace):
    assert "optimal: fits in 6, peak 6" in memo_here(trace, "--capacity", "6B").stdout
    answer = json.loads(memo_here(trace, "--json", "--capacity", "6B").stdout)
    assert (answer["status"], answer["peak"], answer["lower_bound"], answer["gap"]) == ("optimal", 6, 6, 0.0)
    assert set(answer["offsets"]) == {"a", "b", "c"}


def test_offsets_beyond_64_bits_are_refused_in_all_that_is_written(tmp_path):
    path, old = tmp_path / "high.csv", tmp_path / "out.csv"
    path.write_text("id,lower,upper,size\n" + "".join(f"r{k},0,1,{2**62}\n" for k in range(4)))
    old.write_text("old")
    assert "optimal: peak 18446744073709551616" in memo_here(path).stdout
    for arguments in (["--json"], ["-o", old]):
        done = memo_here(path, *arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        assert "does not fit in 64 bits: use a larger unit" in done.stderr
    assert old.read_text() == "old"


def test_a_refusal_has_no_peak_in_its_stages(trace):
    answer = json.loads(memo_here(trace, "--json", "--capacity", "5").stdout)
    assert (answer["status"], answer["peak"]) == ("infeasible", None)
    assert [stage["peak"] for stage in answer["stages"]] == [None]


def test_what_cannot_fit_exits_with_3_names_the_proof_and_leaves_the_old_file(trace, tmp_path):
    old = tmp_path / "out.csv"
    old.write_text("old")
    done = memo(trace, "--capacity", 5, "-o", old)
    assert done.returncode == 3
    assert "at time 2 these need 6: a, b" in done.stdout
    assert old.read_text() == "old"


def test_what_is_not_found_in_the_time_exits_with_4(tmp_path):
    problem = random_requests(4000, seed=1, max_size=10**6)
    write_problem(problem, tmp_path / "hard.csv")
    peak_load = max(
        sum(r.size for r in problem.requests if r.lower <= t < r.upper) for t in range(100)
    )
    done = memo_here(tmp_path / "hard.csv", "--capacity", peak_load, "--time-limit", "300ms", "--json")
    assert done.exit_code == 4, done.stderr
    assert json.loads(done.stdout)["status"] == "unknown"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--capacity", "2"], "at least 3"),
        (["--capacity", "lots"], "is not a size"),
        (["--capacity", "6.5"], "no whole number of bytes"),
        (["--time-limit", "soon"], "is not a time"),
        (["--time-limit", "0s"], "above 0"),
        (["-o", "/nonexistent/out.csv"], "no folder"),
        (["-o", "x" * 300], "too long"),
        (["--colour"], "No such option"),
        (["--capcity", "5"], "Possible options: --capacity"),
    ],
)
def test_usage_errors_exit_with_2_and_say_what_would_work(trace, arguments, word):
    done = memo_here(trace, *arguments)
    assert done.exit_code == 2
    assert word in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_a_device_is_written_to_and_stays_one(trace):
    done = memo(trace, "-o", "/dev/null")
    assert done.returncode == 0, done.stderr
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_reader_that_has_gone_changes_nothing(trace, tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "memo_runtime", "solve", str(trace), "-o", str(tmp_path / "out.csv")]
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert read_placement(tmp_path / "out.csv").peak == 6


def test_a_bad_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("id,lower,upper,size\na,0,4,-3\n")
    done = memo_here(path)
    assert done.exit_code == 2
    assert "bad.csv, line 2, field 'size'" in done.stderr


def test_an_empty_file_is_answered(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    done = memo_here(tmp_path / "empty.csv", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["peak"] == 0


CTRL_C = """
import os, signal, sys
from memo_runtime.cli import solve_output
from memo_runtime.cli.app import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background ignore interrupts
sent = []

def interrupt(line, state):
    if state.peak is not None and not sent:
        sent.append(state)
        os.kill(os.getpid(), signal.SIGINT)

solve_output.ProgressLine.__call__ = interrupt
main()
"""
"""`memo` for a user who presses Ctrl-C as soon as a placement is shown."""


def test_ctrl_c_returns_the_best_placement_so_far(tmp_path):
    write_problem(random_requests(4000, seed=1, max_size=10**6), tmp_path / "hard.csv")
    command = [sys.executable, "-c", CTRL_C, "solve", str(tmp_path / "hard.csv")]
    command += ["--time-limit", "60s", "-o", str(tmp_path / "out.csv")]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 50
    assert "interrupted" in done.stdout
    assert read_placement(tmp_path / "out.csv").peak > 0
