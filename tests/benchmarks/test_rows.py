import json

import pytest

from benchmarks.harness.rows import SCHEMA, RowError, RowFile, make_row, read_rows
from tests.house.sources import ROOT

CONDITIONS = {
    "geometry": "tiny", "scope": "blocks", "blocks": 2, "config": {"seed": 0}, "gpu": None, "driver": None,
    "cpu": "x", "cores": 2, "commit": "abc", "versions": {"torch": "2.13"},
}  # fmt: skip


def row(contender="unwrapped", tokens=64, run="a", **more):
    given = {"run": run, "contender": contender, "seq_len": tokens, "status": "ok", **CONDITIONS}
    return make_row(given | more)


def test_rows_come_back_in_order(tmp_path):
    file = RowFile.open(tmp_path / "new" / "rows.jsonl", "a")
    file.append(row(tokens=64))
    file.append(row(tokens=128))
    again = RowFile.open(file.path, "a")
    assert [(r["seq_len"], r["schema"]) for r in again.rows] == [(64, SCHEMA), (128, SCHEMA)]
    assert again.find("unwrapped", 128)["seq_len"] == 128
    assert again.find("unwrapped", 256) is None


def test_rows_of_other_runs_stay_and_do_not_count(tmp_path):
    RowFile.open(tmp_path / "rows.jsonl", "a").append(row(run="a"))
    other = RowFile.open(tmp_path / "rows.jsonl", "b")
    assert other.rows == []
    other.append(row(run="b"))
    assert len(read_rows(other.path)[0]) == 2


@pytest.mark.parametrize("cut", [1, 40])
def test_a_row_that_was_cut_off_is_dropped_and_the_file_goes_on(tmp_path, cut):
    file = RowFile.open(tmp_path / "rows.jsonl", "a")
    file.append(row(tokens=64))
    whole = file.path.stat().st_size
    file.append(row(tokens=128))
    file.path.write_bytes(file.path.read_bytes()[:-cut])
    again = RowFile.open(file.path, "a")
    assert [r["seq_len"] for r in again.rows] == [64]
    assert again.cut_off > 0
    assert file.path.stat().st_size == whole
    again.append(row(tokens=128))
    assert [r["seq_len"] for r in read_rows(file.path)[0]] == [64, 128]


def test_rows_of_another_schema_are_refused_with_their_place(tmp_path):
    file = RowFile.open(tmp_path / "rows.jsonl", "a")
    file.append(row())
    with file.path.open("a") as out:
        out.write(json.dumps(row(tokens=128) | {"schema": SCHEMA + 1}) + "\n")
    with pytest.raises(
        RowError, match=rf"rows.jsonl:2 has schema {SCHEMA + 1}, this harness reads and writes {SCHEMA}"
    ):
        RowFile.open(file.path, "a")


def test_rows_without_a_schema_are_refused():
    with pytest.raises(RowError, match=r"main_job_h100\.jsonl:1 has no schema version"):
        RowFile.open(ROOT / "benchmarks" / "results" / "main_job_h100.jsonl", "a")


def test_a_whole_line_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{]\n")
    with pytest.raises(RowError, match=r"rows\.jsonl:1 is not JSON"):
        RowFile.open(tmp_path / "rows.jsonl", "a")


@pytest.mark.parametrize(("name", "value"), [("commit", "def"), ("gpu", "H100"), ("config", {"seed": 1})])
def test_a_run_does_not_go_on_under_other_conditions(tmp_path, name, value):
    file = RowFile.open(tmp_path / "rows.jsonl", "a")
    file.check_conditions(CONDITIONS)
    file.append(row())
    file.check_conditions(CONDITIONS)
    with pytest.raises(RowError, match=f"run 'a' in .* was measured with {name} = .* another --run name"):
        file.check_conditions(CONDITIONS | {name: value})


def test_no_row_twice(tmp_path):
    file = RowFile.open(tmp_path / "rows.jsonl", "a")
    file.append(row())
    with pytest.raises(RowError, match="has a row of unwrapped at 64 already"):
        file.append(row())


def test_fields_and_statuses_are_those_of_the_schema():
    with pytest.raises(RowError, match="no field 'color'"):
        row(color="red")
    with pytest.raises(RowError, match="status 'fine' is unknown"):
        row(status="fine")
