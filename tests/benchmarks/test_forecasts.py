"""Forecasts beside what was measured, over all committed rows of memo.

What is beyond a limit stands in ``forecasts_beyond_limits.json`` with a reason and by how much; what stands there has
to be so. The longest lengths that ``memo fit`` forecasts for rehearsed runs stand in ``longest_forecasts.json``.
"""

import json
from itertools import chain

import pytest

from benchmarks.harness.forecast import LIMITS, LONGEST_LIMIT, beyond, forecast_of, off, text
from benchmarks.harness.names import MEMO_WAYS
from benchmarks.harness.side_by_side import longest_of
from benchmarks.harness.tables import find_comparisons
from tests.house.sources import ROOT

HERE = ROOT / "tests" / "benchmarks"
RESULTS = ROOT / "benchmarks" / "results"
#: Contenders that plan; rows of losses alone have names of their own.
MEMO = {f"memo-{way}" for way in MEMO_WAYS if way != "none"}
#: Rounded as in the list.
DIGITS = 3


def committed():
    """(file, row) of every committed row of memo that was measured; those of the allocator carry out another's plan."""
    for path in sorted(RESULTS.glob("*.jsonl")):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if row.get("contender", "").partition("@")[0] in MEMO and row["status"] == "ok" and "way" not in row:
                yield path.name, row


def key(file, row, what):
    return what, file, row["run"], row["contender"], row["seq_len"], row["commit"][:7]


def listed():
    found = {}
    for group in json.loads((HERE / "forecasts_beyond_limits.json").read_text(encoding="utf-8")):
        assert group["reason"]
        for row in group["rows"]:
            one = key(row["file"], row, group["of"])
            assert one not in found, "listed twice"
            found[one] = row["off"]
    return found


def test_every_committed_forecast_holds_or_is_listed_with_its_number():
    measured = {
        key(file, row, what): round(part, DIGITS)
        for file, row in committed()
        for what, part in beyond(row).items()
    }  # fmt: skip
    assert measured == listed()


def test_every_committed_row_of_memo_has_a_forecast_beside_what_was_measured():
    rows = list(committed())
    assert len(rows) >= 52
    wanted = {True: {"peak", "host"}, False: set(LIMITS)}
    assert [key(file, row, "") for file, row in rows if set(off(row)) != wanted[bool(row.get("rehearsed"))]] == []


def memo_row(seconds, peak, pinned, **more):
    told = {"step_seconds": 1.0, "peak_bytes": 1000, "host_bytes": 10 << 20}
    measured = {"step_seconds": seconds, "peak_allocated": peak, "pinned_bytes": pinned}
    return {"status": "ok", "gpu": "a GPU", "details": {"forecast": told}, **measured, **more}


def test_what_is_off_and_what_is_too_far():
    right = memo_row(1.0, 1000, (10 << 20) + 15)
    assert beyond(right) == {}
    assert text(right) == "step +0.0 %, peak +0.0 %, host -0.0 %"
    wrong = memo_row(1.06, 960, 12 << 20)
    assert {name: round(part, 3) for name, part in beyond(wrong).items()} == {
        "step": -0.057, "peak": 0.042, "host": -0.167
    }  # fmt: skip
    assert beyond(memo_row(float("nan"), 1000, 10 << 20)).keys() == {"step"}
    assert off(memo_row(None, 1000, None)) == {"peak": 0.0}
    none = memo_row(1.0, 1000, 5)
    none["details"]["forecast"]["host_bytes"] = 0
    assert beyond(none) == {}
    none["details"]["host_bytes"] = 20 << 20
    assert beyond(none | {"gpu": None}) == {"host": -1.0}
    assert forecast_of(memo_row(1.0, 1000, 5, status="oom")) is None
    assert (off({"status": "ok", "details": None}), text({"status": "ok", "details": {}})) == ({}, "")


def rehearsed():
    """(file, run, contender) -> longest, of every committed rehearsed run that was ended by memory."""
    files = [path for path in sorted(RESULTS.glob("*.jsonl")) if '"schema"' in path.read_text(encoding="utf-8")[:20]]
    runs = [one for one in find_comparisons(files) if one.rehearsed]
    runs = [one for one in runs if any(row["status"] == "oom" for row in one.rows)]
    found = chain.from_iterable(
        (((one.source.rpartition("/")[2], one.first["run"], name), longest_of(one, name)) for name in one.contenders)
        for one in runs
    )
    return {which: tokens for which, tokens in found if which[2].startswith("memo-")}


def forecast_longest():
    given = json.loads((HERE / "longest_forecasts.json").read_text(encoding="utf-8"))
    return {(one["file"], one["run"], one["contender"]): one for one in given}


def test_the_longest_of_every_rehearsed_run_is_as_memo_fit_says():
    """A new run needs its line: `memo fit` with the command of the other lines, --json, `longest`."""
    measured, told = rehearsed(), forecast_longest()
    assert set(measured) == set(told)
    far = {
        which: (told[which]["longest"], tokens)
        for which, tokens in measured.items()
        if not abs(told[which]["longest"] - tokens) <= LONGEST_LIMIT * tokens
    }
    assert far == {which: tuple(one["beyond"]) for which, one in told.items() if "beyond" in one}


@pytest.mark.slow
@pytest.mark.parametrize("which", sorted(forecast_longest()), ids="-".join)
def test_what_memo_fit_says_of_the_longest(which):
    from typer.testing import CliRunner

    from memo_runtime.cli.app import app

    one = forecast_longest()[which]
    found = CliRunner().invoke(app, [*one["fit"], "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["longest"] == one["longest"]
