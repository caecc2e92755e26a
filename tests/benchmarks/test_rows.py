import errno
import json
import os

import pytest

from benchmarks.harness.rows import SCHEMA, RowError, RowFile, held, make_row, read_rows
from tests.house.sources import ROOT

CONDITIONS = {
    "geometry": "tiny", "scope": "blocks", "blocks": 2, "gpu": None, "driver": None,
    "config": {"seed": 0, "dtype": "float32", "attention": "auto"},
    "cpu": "x", "cores": 2, "commit": "abc", "versions": {"torch": "2.13"},
}  # fmt: skip
MEASURED = {"step_seconds": 1.0, "peak_allocated": 2**20}


def row(contender="unwrapped", tokens=64, run="a", **more):
    given = {"run": run, "contender": contender, "seq_len": tokens, "status": "ok", **MEASURED, **CONDITIONS}
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


@pytest.mark.parametrize("cut", [2, 40])
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


@pytest.mark.parametrize("run", ["a", "b"])
def test_a_last_row_without_its_newline_is_a_row(tmp_path, run):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row(run=run)))
    file = RowFile.open(path, "a")
    assert (len(file.rows), file.cut_off) == (run == "a", 0)
    file.append(row(tokens=128))
    assert [(r["run"], r["seq_len"]) for r in read_rows(path)[0]] == [(run, 64), ("a", 128)]


ROW = json.dumps(row())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"precious":1}', "rows:1 has no schema version"),
        ('{"precious":1', "rows:1 is no row, nor the beginning of one"),
        ('{"schema": 2, "run": "a', "rows:1 is no row, nor the beginning of one"),
        (f'{ROW}\n{{"schema": 2, "ru', "rows:2 is no row, nor the beginning of one"),
        ("my notes", "rows:1 is no row, nor the beginning of one"),
        ('{"sc', "rows:1 is no row, nor the beginning of one"),
        (f"{ROW}\nmy notes", "rows:2 is no row, nor the beginning of one"),
        (json.dumps(row() | {"schema": 2}), "rows:1 has schema 2, this harness"),
        (f"{ROW}\n" + json.dumps(row() | {"schema": 2}), "rows:2 has schema 2, this harness"),
        (json.dumps(row() | {"schema": True}) + "\n", "rows:1 has schema true, this harness"),
        ('{"schema": 1, "run": "a"}\n', "rows:1 is no row of this harness, it has no field 'contender'"),
        (json.dumps(row() | {"config": None}) + "\n", "its config is None"),
        (json.dumps(row() | {"status": "fine"}) + "\n", "its status is 'fine'"),
        *(
            (json.dumps(row() | {name: value}) + "\n", f"rows:1 is no row of this harness, its {said}: use another")
            for name, value, said in (
                ("step_seconds", None, "step_seconds is None"),
                ("step_seconds", "1", "step_seconds is '1'"),
                ("step_seconds", 0, "step_seconds is 0"),
                ("step_seconds", float("nan"), "step_seconds is nan"),
                ("step_seconds", True, "step_seconds is True"),
                ("peak_allocated", None, "peak_allocated is None"),
                ("peak_allocated", 1.5, "peak_allocated is 1.5"),
                ("p20", "1", "p20 is '1'"),
                ("details", [], r"details is \[\]"),
                ("error", 3, "error is 3"),
                ("versions", {}, "versions.torch is None"),
                ("config", {}, "config.dtype is None"),
                ("commit", None, "commit is None"),
                ("seq_len", -4, "seq_len is -4"),
                ("seq_len", True, "seq_len is True"),
            )
        ),
        (b"\xff\xfe\n", "rows:1 is not UTF-8"),
        (b"\xff\xfe", "rows:1 is no row, nor the beginning of one"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_rows_is_refused_and_stays(tmp_path, content, said):
    path, content = tmp_path / "rows", content if isinstance(content, bytes) else content.encode()
    path.write_bytes(content)
    with pytest.raises(RowError, match=said), held(path):
        RowFile.open(path, "a")
    assert path.read_bytes() == content


@pytest.mark.parametrize("rows", [0, 1])
def test_a_row_that_was_cut_off_is_dropped_by_how_it_begins(tmp_path, rows):
    path = tmp_path / "rows"
    path.write_text(f"{ROW}\n" * rows + ('{"s' if rows else ROW[:13]))
    assert RowFile.open(path, "a").cut_off == (3 if rows else 13)
    assert path.read_text() == f"{ROW}\n" * rows


def test_rows_are_kept_in_regular_files_only(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name, said in (
        ("folder", "it is a folder; rows are kept in a regular file"),
        ("file/rows", "Not a directory"),
        ("pipe", "it is a device, a pipe or a socket"),
        ("link", "it is a device, a pipe or a socket"),
    ):
        for use in (held, lambda path: RowFile.open(path, "a")):
            with pytest.raises(RowError, match=said), use(tmp_path / name):
                pytest.fail("it was taken")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "kept"


def test_nothing_is_removed_but_what_the_run_made_itself(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("target")
    for name in ("empty", "link", "new", "target"):
        with held(tmp_path / name):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "target"]


def test_what_the_system_refuses_is_one_message(tmp_path, monkeypatch):
    file = RowFile.open(tmp_path / "rows", "a")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RowError, match=r"cannot write to .*rows: No space left"):
        file.append(row())


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


def test_what_differs_is_named_and_not_all_that_was_measured_with(tmp_path):
    file = RowFile.open(tmp_path / "rows.jsonl", "a")
    file.append(row())
    config = CONDITIONS["config"] | {"seed": 1, "allocator": "x"}
    with pytest.raises(RowError) as caught:
        file.check_conditions(CONDITIONS | {"config": config})
    assert "was measured with config = {'seed': 0}, here it is {'seed': 1, 'allocator': 'x'}: rows" in str(caught.value)


def test_a_reference_and_a_rehearsal_have_no_times(tmp_path):
    path = tmp_path / "rows"
    rows = [
        row("reference", step_seconds=None, peak_allocated=None, gradient_difference=None),
        row(rehearsed=True, step_seconds=None),
        row("checkpoint", status="oom", error="x", step_seconds=None, peak_allocated=None),
        row("selective", gradient_difference=float("nan"), status="error", error="x"),
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert len(read_rows(path)[0]) == 4


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
