import json
import sys

import pytest

from benchmarks.solver import document, published
from benchmarks.solver.table import read_rows
from memo_solver.instances import planted_packing
from memo_solver.writing import write_problem

CSV = "buffer,start,end,size,offset\n0,-1,4,3,\n1,2,6,3,9\n2,4,8,3,0\n"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["published", *map(str, arguments)])
    published.main()


def test_a_folder_of_instances_gives_rows_and_a_table(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    folder = tmp_path / "instances"
    folder.mkdir()
    (folder / "small.csv").write_text(CSV)
    write_problem(planted_packing(40, seed=1), folder / "planted.csv")
    (tmp_path / "best.json").write_text(json.dumps({"small": 6}))
    options = ["--limit", 10, "--threads", 1, "--commit", "c0ffee", "--out", out]
    run(monkeypatch, folder, "--set", "ours, lowest", "--heights", tmp_path / "best.json", *options)
    run(monkeypatch, folder, "--set", "ours, in 4096", "--capacity", 4096, *options)
    assert "small | 3 requests | best known 6 | optimal, peak 6, bound 6" in capsys.readouterr().out
    rows = list(read_rows(out))
    assert [(row["instance"], row["status"], row["peak"]) for row in rows[:2]] == [
        ("planted", "optimal", 4096), ("small", "optimal", 6),
    ]  # fmt: skip
    assert [(row["capacity"], row["status"], row["load"]) for row in rows[2:]] == [
        (4096, "optimal", 4096), (4096, "optimal", 6),
    ]  # fmt: skip
    shown = "\n".join(document._published(rows))
    assert "| small | 3 | lowest | 6 | 6 | 6 | 6 | optimal | " in shown
    assert "Published instances that are not in this repository: ours, in 4096." in shown


def test_what_is_no_instance_ends_with_a_reason(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"no \.csv files"):
        run(monkeypatch, tmp_path, "--set", "none")
    (tmp_path / "x.csv").write_text("id,begin,size\n")
    with pytest.raises(SystemExit, match="no column lower, upper"):
        run(monkeypatch, tmp_path, "--set", "none")
