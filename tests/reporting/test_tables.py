from dataclasses import replace

import pytest

from memo_runtime.placement import ArenaReport
from memo_runtime.records import Executor, Forecast
from memo_runtime.reporting.plan_table import plan_table
from memo_runtime.reporting.profile_table import profile_table
from memo_runtime.reporting.report_table import report_table
from memo_runtime.reporting.text_table import run_name, runs, table
from tests.reporting.samples import PLAN, PROFILE, REPORT, block_plan, block_report

REASON = (
    "saves a tensor whose size depends on data (aten.nonzero), so it cannot be cut along tokens and is run "
    "again as a whole, with its input swapped"
)


def widest(text):
    return max(map(len, text.splitlines()))


def test_a_plan_prints_as_its_table():
    assert str(PLAN) == plan_table(PLAN)
    assert (
        plan_table(PLAN)
        == """\
plan: policy memo, alpha 0.375, 3 x 4,096 tokens on cpu

blocks            executor  alpha    to host  to device        kept  host memory   recomputed
model.layers.0-1  replay    0.375  48.00 MiB  48.00 MiB           -    48.00 MiB  12.00 GFLOP
model.layers.2    keep          -          -          -  200.00 MiB            -            -
total                              96.00 MiB  96.00 MiB  200.00 MiB    96.00 MiB  24.00 GFLOP

forecast          value     limit  source
device peak    3.00 GiB  4.00 GiB  budget
host memory   96.00 MiB  2.00 GiB  cgroup v2
device floor   2.00 GiB            with every activation sent away
step time        1.25 s

notes
  - optimizer state is assumed: AdamW in the parameters' dtype
  - seconds at 4,096 tokens are extrapolated from 1,024"""
    )


def test_a_report_prints_forecast_beside_actual():
    assert str(REPORT) == report_table(REPORT)
    assert (
        report_table(REPORT)
        == """\
report: policy memo, after 7 steps

blocks            executor  alpha    to host  to device        kept   recomputed
model.layers.0-1  replay    0.375  48.00 MiB  48.00 MiB           -  12.00 GFLOP
model.layers.2    keep          -          -          -  200.00 MiB            -

totals            actual     forecast  difference
device peak     3.03 GiB     3.00 GiB      +1.0 %
stash peak    200.00 MiB   200.00 MiB       exact
host memory    96.00 MiB    96.00 MiB       exact
to host        96.00 MiB    96.00 MiB       exact
to device      96.00 MiB    96.00 MiB       exact
kept          200.00 MiB   200.00 MiB       exact
recomputed   24.00 GFLOP  24.00 GFLOP       exact
step time         1.50 s       1.25 s     +20.0 %

notes
  - key/value cache is off in training"""
    )


def test_planned_memory_is_said_with_what_missed_it():
    arena = ArenaReport(
        state="planned", plans=2, arena_bytes=6 * 2**30, planned_peak=5 * 2**30, lower_bound=4 * 2**30, requests=200,
        served=198, bytes=1000, served_bytes=999, misses=(("other_stream", 2),), reserved_bytes=7 * 2**30,
        resident_bytes=2**29,
    )  # fmt: skip
    lines = str(replace(REPORT, arena=arena)).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("memory by plan"))
    assert lines[at] == (
        "memory by plan: planned; 198 of 200 requests and 99.90 % of the bytes of the last step (not: 2 other stream)"
    )
    assert lines[at + 1] == (
        "  plan 5.00 GiB, 25.00 % above the lower bound; arena 6.00 GiB for 2 plans, beside it 512.00 MiB that outlive "
        "the step; reserved 7.00 GiB"
    )
    none = ArenaReport(state="the plan needs 5 GiB too much")
    assert "memory by plan: the plan needs 5 GiB too much\n" in str(replace(REPORT, arena=none))


def test_thirty_like_blocks_are_one_line_and_reasons_stand_below():
    blocks = (*map(block_plan, range(30)), block_plan(30, Executor.RECOMPUTE, REASON), block_plan(31))
    text = plan_table(replace(PLAN, blocks=blocks))
    assert "model.layers.0-29  replay" in text
    assert "\nmodel.layers.30: saves a tensor whose size" in text
    assert widest(text) <= 110


def test_a_fallback_in_a_report_says_why():
    blocks = (block_report(0), block_report(1, Executor.RECOMPUTE, REASON))
    text = report_table(replace(REPORT, blocks=blocks))
    assert "model.layers.1: saves a tensor" in text
    assert widest(text) <= 110


def test_long_names_lose_their_front_and_the_table_stays_narrow():
    name = "base_model.model.model.language_model.transformer.decoder.layers.0"
    text = plan_table(replace(PLAN, blocks=(replace(block_plan(0), name=name),)))
    assert ".decoder.layers.0  replay" in text
    assert widest(text) <= 110


def test_a_report_without_forecast():
    text = report_table(replace(REPORT, totals=replace(REPORT.totals, forecast=Forecast()), blocks=(), notes=()))
    assert "not foreseen" in text


def test_a_report_before_the_first_step_says_nothing_of_what_was_not_measured():
    before = replace(REPORT, totals=replace(REPORT.totals, steps=0), blocks=(), notes=())
    text = report_table(before)
    assert "no step yet" in text
    assert "forecast" in text
    assert "device peak" in text
    assert not any(word in text for word in ("exact", "difference", "blocks", "to host"))
    without = report_table(replace(before, totals=replace(before.totals, forecast=Forecast())))
    assert without.splitlines()[0].endswith("no step yet")
    assert not any(word in without for word in ("forecast", "exact", "device peak"))


def test_an_empty_plan_prints():
    assert "no blocks" in plan_table(replace(PLAN, blocks=(), notes=()))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["layers.7"], "layers.7"),
        (["layers.8", "layers.9", "layers.10"], "layers.8-10"),
        (["h.0.block", "h.1.block"], "h.0-1.block"),
        (["stage2.layers.0", "stage2.layers.1"], "stage2.layers.0-1"),
        (["layers.0", "layers.2"], "layers.0 .. layers.2 (2)"),
        (["first", "second"], "first .. second (2)"),
    ],
)
def test_names_of_runs(names, expected):
    assert run_name(names) == expected


def test_runs_join_neighbours_only():
    assert runs([1, 1, 2, 1], key=lambda item: item) == [[1, 1], [2], [1]]


def test_columns_without_content_are_left_out():
    assert table(("a", "b", "c"), [("x", "", "1")]) == "a  c\nx  1"


def test_a_profile_prints_what_blocks_save():
    text = profile_table(PROFILE)
    assert str(PROFILE) == text
    assert text.startswith("profile: 3 x 4,096 tokens on cpu\n")
    assert "model.layers.0-2  LlamaDecoderLayer" in text
    assert "AdamW, assumed" in text
    assert "5.5 GB/s  assumed" in text
    assert widest(text) <= 110
