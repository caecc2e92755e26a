"""What is said about a step, and the JSON line, from made-up steps."""

import json
import math

import pytest
from train_options import parse_options
from train_progress import HEADER, Outcome, Step, Talk, Workload, largest_difference, result_line, step_line

from memo_runtime.records import Forecast
from memo_runtime.reports import Report, Totals

WORKLOAD = Workload(tokens=2048, flops=10**12, passes=2, device_name="NVIDIA H100 80GB HBM3")
TOTALS = Totals(
    bytes_to_host=3 * 2**20,
    bytes_to_device=3 * 2**20,
    bytes_kept=0,
    recomputed_flops=10**11,
    peak_bytes=5 * 2**30,
    stash_peak_bytes=0,
    stash_bytes=0,
    host_bytes=4 * 2**20,
    host_bytes_in_use=0,
    open_copies=0,
    step_seconds=0.004,
    steps=1,
    forecast=Forecast(step_seconds=0.005, peak_bytes=6 * 2**30, host_bytes=7 * 2**20),
)
REPORT = Report(policy="memo", blocks=(), totals=TOTALS, states=None)


def step(index, loss, seconds, report=REPORT):
    return Step(index=index, loss=loss, seconds=seconds, report=report)


def test_a_line_has_all_columns():
    line = step_line(step(0, 2.5, 0.01), WORKLOAD)
    assert " ".join(line.split()) == (
        "1 2.5000 204,800 10.1% 10.00 ms 8.00 ms 10.00 ms 5.00 GiB 6.00 GiB 4.00 MiB 6.00 MiB 20.0%"
    )
    unknown = Workload(tokens=2048, flops=10**12, passes=2, device_name="cpu")
    assert step_line(step(0, 2.5, 0.01, None), unknown).split()[3:] == ["-", "10.00", "ms", *"-------"]
    assert len(HEADER.splitlines()[1]) == len(line) <= 120


def test_the_largest_difference():
    assert largest_difference([1.0, 2.02], [1.0, 2.0]) == pytest.approx(0.01)
    assert largest_difference([1.0, 5.0], [1.0]) == 0.0
    assert largest_difference([], [1.0]) is None
    assert largest_difference([1.0, math.nan], [1.0, 1.0]) is None


def test_the_json_line():
    outcome = Outcome(options=parse_options(["--budget", "1KiB"]), seq_len=512, workload=WORKLOAD)
    outcome.steps += [step(0, 3.0, 9.0), step(1, 2.0, 1.0), step(2, math.nan, 1.0), step(3, 1.0, 4.0)]
    outcome.reference += [step(0, 3.0, 1.0, None), step(1, 2.02, 1.0, None)]
    result = json.loads(result_line(outcome))
    assert result["losses"] == [3.0, 2.0, None, 1.0]
    assert result["max_rel_loss_diff"] == pytest.approx(0.02 / 2.02)
    assert (result["step_seconds"], result["tokens_per_second"]) == (1.0, 2048.0)
    assert (result["bytes_to_host"], result["recomputed_flops"]) == (3 * 2**20, 10**11)
    assert result["forecast"] == {"step_seconds": 0.005, "peak_bytes": 6 * 2**30, "host_bytes": 7 * 2**20}
    assert (result["budget"], result["host_budget"], result["steps"]) == (1024, None, 4)
    assert result["mfu"] == pytest.approx(10**12 / 989.4e12)
    assert (result["policy"], result["device"]) == ("memo", "NVIDIA H100 80GB HBM3")


def test_the_json_line_of_a_run_without_steps():
    result = json.loads(result_line(Outcome(options=parse_options([]))))
    assert result["losses"] == []
    assert (result["bytes_to_host"], result["recomputed_flops"], result["steps"]) == (0, 0, 0)
    assert result["max_rel_loss_diff"] is result["step_seconds"] is result["forecast"] is None


def test_without_a_terminal_there_are_only_lines(capsys):
    with Talk(3) as talk:
        talk.phase("training")
        talk.line("a [bold]line[/bold]")
        talk.advance()
    out, err = capsys.readouterr()
    assert (out, err) == ("", "a [bold]line[/bold]\n")


@pytest.mark.parametrize(("no_color", "bar"), [("", True), ("1", False)])
def test_a_terminal_gets_a_bar_unless_it_wants_no_colour(capsys, monkeypatch, no_color, bar):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    with Talk(3) as talk:
        talk.phase("training")
        talk.line("a [bold]line[/bold]")
        talk.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert "a [bold]line[/bold]\n" in err
    assert ("training" in err) == bar
