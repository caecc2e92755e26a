"""`memo bench` finds the checkout's harness and becomes it."""

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from memo_runtime.cli import bench
from memo_runtime.cli.app import app
from memo_runtime.cli.exits import ExitCode
from memo_runtime.errors import CheckoutMissingError
from tests.house.sources import ROOT

ROWS = ROOT / "benchmarks" / "results" / "harness_tiled_h100.jsonl"


def process(*arguments, cwd):
    """`memo` as a process, since it becomes another one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "solver")])}
    command = [sys.executable, "-m", "memo_runtime", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_everything_behind_the_verb_is_the_harness_s(monkeypatch):
    became = []
    monkeypatch.setattr(bench.os, "execve", lambda *given: became.append(given))
    given = ["--lengths", "8K", "--contenders", "unwrapped,memo-auto", "-h", "x.jsonl"]
    for verb, module in (("run", "benchmarks.harness"), ("table", "benchmarks.harness.tables")):
        CliRunner().invoke(app, ["bench", verb, *given])
        program, command, environment = became.pop()
        assert program == command[0] == sys.executable
        assert command[1:] == ["-P", "-m", module, *given]
        assert environment["PYTHONPATH"].split(os.pathsep)[:2] == [str(ROOT), str(ROOT / "solver")]


def checkout(folder):
    for name in ("benchmarks/harness/__main__.py", "memo_runtime/__init__.py"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    return folder


def test_the_checkout_is_that_of_the_package_or_the_one_around(tmp_path):
    own, other = checkout(tmp_path / "own"), checkout(tmp_path / "other")
    installed = tmp_path / "site-packages" / "memo_runtime"
    assert bench.find_checkout(package=own / "memo_runtime", current=other) == own
    assert bench.find_checkout(package=installed, current=other) == other
    assert bench.find_checkout(package=installed, current=other / "benchmarks") == other


def test_without_a_checkout_it_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(CheckoutMissingError, match=r"not part of the installed package .*: run this in a checkout, or"):
        bench.find_checkout(package=tmp_path / "site-packages" / "memo_runtime", current=tmp_path)
    monkeypatch.setattr(bench, "_MARKS", ("what no checkout has",))
    result = CliRunner().invoke(app, ["bench", "run", "--lengths", "8K"])
    assert result.exit_code == ExitCode.USAGE
    assert "pip install --editable" in result.output


def test_a_table_from_any_folder_whatever_is_there(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise RuntimeError('not this one')")
    found = process("bench", "table", str(ROWS), cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    assert "NVIDIA H100 80GB HBM3" in found.stdout
    assert "| memo-auto@24GiB |" in found.stdout


def test_errors_and_exit_codes_are_the_harness_s(tmp_path):
    found = process("bench", "run", "--lengths", "8K", "--contenders", "nonsense", cwd=tmp_path)
    assert found.returncode == ExitCode.USAGE
    assert "memo bench run: error: contender 'nonsense' is unknown; there are: kernels, unwrapped" in found.stderr
