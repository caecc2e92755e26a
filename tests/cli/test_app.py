import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from memo_runtime import __version__, errors
from memo_runtime.cli.app import app
from memo_runtime.cli.exits import ExitCode, exit_code
from memo_runtime.persist import save
from memo_runtime.records import SCHEMA_VERSION
from tests.house.sources import ROOT
from tests.reporting.samples import PLAN, PROFILE

VERBS = ("bench", "check", "doctor", "fit", "plan", "profile", "show", "solve")


def memo(*arguments):
    return CliRunner().invoke(app, list(arguments))


def python_m(*arguments):
    command = [sys.executable, "-m", "memo_runtime", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_help_names_every_verb():
    shown = memo("--help").stdout
    assert all(f"\n  {verb}" in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_examples(verb):
    result = memo(verb, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"memo {verb}" in result.stdout


def test_the_version():
    assert memo("--version").stdout == f"memo-runtime {__version__}\n"


def test_python_m_is_the_same():
    result = python_m("--version")
    assert (result.returncode, result.stdout) == (0, f"memo-runtime {__version__}\n")


@pytest.mark.parametrize("arguments", [("--help",), ("check", "--help")], ids=" ".join)
def test_help_is_there_in_half_a_second(arguments):
    took = []
    for _ in range(5):
        start = time.perf_counter()
        assert python_m(*arguments).returncode == 0
        took.append(time.perf_counter() - start)
    assert min(took) < 0.5


def test_help_imports_the_command_line_and_nothing_behind_it():
    """The dataclasses of a profile and a plan alone take as long to make as all of this."""
    command = [sys.executable, "-c", "import sys, memo_runtime.cli.app; print(*sys.modules)"]
    modules = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    ours = {name for name in modules if name.startswith("memo") and not name.startswith("memo_runtime.cli")}
    assert ours == {"memo_runtime", "memo_runtime.errors"}


@pytest.mark.parametrize(
    "arguments", [(), ("--nonsense",), ("nonsense",), ("show",), ("check", "--seed", "x")]
)
def test_usage_errors_exit_with_two(arguments):
    assert memo(*arguments).exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.PlanInfeasibleError, 3),
        (errors.HostLimitError, 3),
        (errors.PlanMismatchError, 5),
        (errors.ReplayMismatchError, 1),
        (errors.PlanFileError, 2),
        (errors.OutputError, 2),
        (errors.DeviceUnavailableError, 2),
        (errors.MemoError, 2),
    ],
)
def test_errors_have_their_exit_codes(error, code):
    assert exit_code(error("text")) == code


def test_show_prints_the_table_of_either_file(tmp_path):
    for value, start in ((PLAN, "plan: policy memo"), (PROFILE, "profile: 3 x 4,096 tokens")):
        path = tmp_path / "file.json"
        save(value, path)
        result = memo("show", str(path))
        assert result.exit_code == 0
        assert result.stdout.startswith(start)


def test_a_file_that_is_none_is_one_message_without_a_traceback(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('{"memo_runtime": "plan", "schema_version": 0}')
    result = python_m("show", str(path))
    assert result.returncode == ExitCode.USAGE
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"memo: {path}: field 'schema_version' is 0, and this release reads {SCHEMA_VERSION}; "
        "make the file again with the installed release"
    ]


def test_a_plan_is_also_a_page_and_a_profile_is_none(tmp_path):
    for value, name in ((PLAN, "plan.json"), (PROFILE, "profile.json")):
        save(value, tmp_path / name)
    (tmp_path / "sub").mkdir()
    shown = memo("show", str(tmp_path / "plan.json"), "--html", str(tmp_path / "plan.html"))
    assert shown.exit_code == 0
    assert "plan: policy" in shown.stdout
    assert "<canvas" in (tmp_path / "plan.html").read_text()
    refused = memo("show", str(tmp_path / "profile.json"), "--html", str(tmp_path / "profile.html"))
    assert refused.exit_code == ExitCode.USAGE
    assert "holds a profile" in refused.output
    assert not (tmp_path / "profile.html").exists()
    before = (tmp_path / "plan.json").read_bytes()
    over = memo("show", str(tmp_path / "plan.json"), "--html", str(tmp_path / "sub" / ".." / "plan.json"))
    assert (over.exit_code, "take the place of the plan" in over.output) == (ExitCode.USAGE, True)
    assert (tmp_path / "plan.json").read_bytes() == before
    empty = memo("show", str(tmp_path / "plan.json"), "--html", "")
    assert (empty.exit_code, "--html is empty" in empty.output) == (ExitCode.USAGE, True)
