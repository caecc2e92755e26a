import argparse
import json
import os

import pytest

from benchmarks.solver.programs import STREAM_FILLS, STYLES, program
from benchmarks.solver.sections import Job, jobs_of
from benchmarks.solver.table import check_packages, key_of, read_rows, run, table
from memo_solver import SolveParams, Status, solve
from memo_solver.bounds import peak_load


@pytest.mark.parametrize("style", [*STYLES, *STREAM_FILLS])
def test_programs_are_full_to_the_capacity_and_the_same_for_a_seed(style):
    problem = program(style, 2)
    assert problem == program(style, 2)
    assert problem != program(style, 3)
    assert 100 <= len(problem.requests) <= 520
    assert peak_load(problem).bound == problem.capacity
    assert all(r.size % 512 == 0 and r.lower < r.upper for r in problem.requests)


def test_a_loose_program_fits():
    solution = solve(program("30 % thinned", 0), SolveParams(time_limit_seconds=30, num_threads=2))
    assert solution.status is Status.OPTIMAL


def arguments(path, minutes=1.0):
    return argparse.Namespace(workers=1, threads=1, minutes=minutes, out=path, commit="c0ffee")


def job(instance, answer, limit=1.0):
    return Job(section="s", group="g", instance=instance, contender="c", limit_seconds=limit, run=answer)


def test_rows_are_appended_with_provenance_and_failures_are_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"section": "s", "gro')  # a run that was killed
    jobs = [job("a", lambda: {"solved": True, "seconds": 0.5}), job("b", lambda: 1 / 0)]
    run(jobs, arguments(path), sorted(os.sched_getaffinity(0)))
    rows = {row["instance"]: row for row in read_rows(path)}
    assert key_of(rows["a"]) == jobs[0].key
    assert rows["a"]["provenance"]["commit"] == "c0ffee"
    assert rows["b"]["error"].startswith("ZeroDivisionError")
    assert table([rows["a"]]) == ["g | c | 1 of 1 | median 0.5 s, slowest 0.5 s | all runs 0 s"]


def test_no_job_begins_that_could_end_too_late(tmp_path):
    path = tmp_path / "rows.jsonl"
    jobs = [job("long", lambda: {"x": 1}, limit=600.0), job("short", lambda: {"x": 2})]
    run(jobs, arguments(path), sorted(os.sched_getaffinity(0)))
    assert [row["instance"] for row in read_rows(path)] == ["short"]
    assert "provenance" in json.loads(path.read_text().splitlines()[0])


def test_every_section_lists_each_job_once():
    for section in ("refused", "layered", "traces", "planted-small", "planted-large", "planted-coarse", "compiler"):
        keys = [listed.key for listed in jobs_of(section, None)]
        assert len(keys) == len(set(keys)) > 0


def test_a_missing_package_is_no_lost_race(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "omnimalloc" else object())
    wanted = jobs_of("planted-small", 1)
    with pytest.raises(SystemExit, match="not installed: omnimalloc"):
        check_packages(wanted)
    check_packages([listed for listed in wanted if not listed.contender.startswith("omnimalloc")])


def test_rivals_are_told_apart():
    assert {listed.contender for listed in jobs_of("planted-small", 1) if not listed.is_rival} == {"memo_solver"}
    assert [listed.number for listed in jobs_of("traces", 2) if not listed.is_rival] == [0, 1, 2, 3]
